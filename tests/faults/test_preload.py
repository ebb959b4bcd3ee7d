"""What the server of ranks has imported: nothing that keeps its forks from the GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOOK = "import sys, tests.faults.preload; print('bitsandbytes' in sys.modules)"


@pytest.mark.parametrize(("keys", "imported"), [({}, "True"), ({"LONGFT_TEST_ON_GPUS": "1"}, "False")])
def test_on_gpus_bitsandbytes_is_each_ranks_own(keys: dict[str, str], imported: str) -> None:
    """It asks CUDA for the device as it is imported, and CUDA cannot be used again behind a fork."""
    pytest.importorskip("bitsandbytes")
    env = {name: value for name, value in os.environ.items() if name != "LONGFT_TEST_ON_GPUS"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=ROOT, env=env | keys, capture_output=True, text=True, check=False
    )
    assert done.stdout.split()[-1:] == [imported], done.stderr
