"""A GPU that is full: the rank it happens to says what would save memory, exit code 64, and no step is lost."""

from __future__ import annotations

from pathlib import Path

from ds_longft.errors import EXIT_CONFIG
from tests.faults.ranks import Launcher, checkpoints, status, trace


def test_out_of_memory_on_one_rank(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(output, faults={1: {"point": "step", "step": 5, "do": "oom"}}, timeout_s=60)
    assert codes[1] == EXIT_CONFIG, run.text()
    assert codes[0] not in (0, None)
    assert "out of GPU memory in training: CUDA out of memory. Tried to allocate 3.50 GiB" in run.text(1)
    assert "Traceback" not in run.text(1)
    assert status(output)["exit_code"] == EXIT_CONFIG
    assert "ds-longft plan" in status(output)["error"]
    assert 4 in checkpoints(output)
    codes, run = launcher.run(output)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)
