"""Layer inputs and attention outputs in files: the same run to the bit, and nothing left behind however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ds_longft.errors import EXIT_CONFIG
from tests.faults.ranks import CRASH, Launcher, checkpoints, reached, status, trace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "nvme"
    path.mkdir()
    return path


def unnamed_bytes(pid: int, folder: Path) -> int:
    """Of files in `folder` that a process holds open."""
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(link).startswith(str(folder)):
                found += link.stat().st_size
        except OSError:  # closed in between
            continue
    return found


def test_the_same_run_to_the_bit(launcher: Launcher, golden: Path, tmp_path: Path, folder: Path) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(output, "--train.offload_disk", str(folder))
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)
    assert f"lie in files without a name in {folder}" in run.text(0)
    assert list(folder.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("keys", [("--train.recompute", "sqrt"), ("--objective", "dpo", "--lora.dropout", "0")])
def test_segments_and_pairs(launcher: Launcher, tmp_path: Path, folder: Path, keys: tuple[str, ...]) -> None:
    if "dpo" in keys:
        keys = (*keys, "--data.train", str(launcher.config.parent / "pairs.jsonl"))
    traces = []
    for name, more in (("plain", ()), ("disk", ("--train.offload_disk", str(folder)))):
        codes, run = launcher.run(tmp_path / name, *keys, *more)
        assert codes == [0, 0], run.text()
        traces.append(trace(tmp_path / name))
    assert traces[0] == traces[1]


def test_kill_9_leaves_nothing(launcher: Launcher, golden: Path, tmp_path: Path, folder: Path) -> None:
    output, keys = tmp_path / "out", ("--train.offload_disk", str(folder))
    wait = {"point": "step", "step": 5, "do": "sleep", "seconds": 60.0}
    run = launcher.start(output, *keys, faults={0: wait, 1: wait})
    run.wait_for(lambda: reached(output) == 4 and 4 in checkpoints(output))
    run.wait_for(lambda: all(unnamed_bytes(p.pid, folder) for p in run.processes))  # what would have been left
    assert list(folder.iterdir()) == []
    run.signal(signal.SIGKILL)
    assert run.wait() == [CRASH, CRASH]
    assert list(folder.iterdir()) == []
    codes, run = launcher.run(output, *keys)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)


def test_a_disk_that_fills_in_mid_run(launcher: Launcher, golden: Path, tmp_path: Path, folder: Path) -> None:
    output, keys = tmp_path / "out", ("--train.offload_disk", str(folder))
    codes, run = launcher.run(output, *keys, faults={1: {"point": "disk", "count": 100, "do": "raise"}})
    assert codes[1] == EXIT_CONFIG, run.text()
    assert codes[0] not in (0, None)
    assert f"train.offload_disk: {folder} is full" in run.text(1)
    assert "Traceback" not in run.text(1)
    assert status(output)["exit_code"] == EXIT_CONFIG
    codes, run = launcher.run(output, *keys)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)


def test_a_folder_that_is_not_there(launcher: Launcher, tmp_path: Path) -> None:
    codes, run = launcher.run(tmp_path / "out", "--train.offload_disk", str(tmp_path / "nowhere"))
    assert codes == [EXIT_CONFIG, EXIT_CONFIG], run.text()
    assert f"train.offload_disk: {tmp_path / 'nowhere'} is no folder" in run.text(0)
