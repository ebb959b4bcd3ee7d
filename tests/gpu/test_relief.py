"""Another process takes memory away in the middle of a run: the run goes on, to the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def three_steps(*words: str) -> dict[str, Any]:
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "CUDA_VISIBLE_DEVICES": one}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.full_gpu", *words], capture_output=True, text=True, timeout=200,
        env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_gpu_that_becomes_full_gives_back_what_is_kept() -> None:
    quiet, crowded = three_steps(), three_steps("hog")
    assert quiet["given_gib"] == [0.0, 0.0, 0.0]
    assert crowded["given_gib"][1] > 1.0
    assert crowded["given_gib"][2] == 0.0
    assert 0 < crowded["kept"] < quiet["kept"]
    assert crowded["losses"] == quiet["losses"]
