"""Before its first step the policy is its reference: a DPO loss of exactly ln 2, in bf16 and however long the answers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("passes", ["one", "two"])
def test_loss_begins_at_ln_2(tmp_path: Path, passes: str) -> None:
    words = ["--objective", "dpo", "--documents", "32768x2", "--passes", passes, "--layers", "4", "--steps", "1"]
    command = [sys.executable, "benchmarks/step.py", *words, "--append", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out.jsonl").read_text())["loss_first"] == round(math.log(2), 5)
