"""Ranks that a command starts by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_longft.ranks.launch import telling_code

RANK = """
import os, pathlib, time
pathlib.Path(os.environ["RANK"] + ".pid").write_text(str(os.getpid()))
time.sleep(60)
"""
START = "from ds_longft.ranks.launch import launch_ranks; launch_ranks('one_rank', [], ranks=2, gpus=0)"


def alive(pid: int) -> bool:
    """Whether it still does anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_who_started_them(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "one_rank.py").write_text(RANK)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    starter = subprocess.Popen([sys.executable, "-c", START], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    pids: list[int] = []
    until = time.monotonic() + 60
    while len(pids) < len(files) and time.monotonic() < until:
        time.sleep(0.1)
        pids = [int(file.read_text()) for file in files if file.exists() and file.read_text()]
    starter.send_signal(how)
    starter.wait()
    try:
        while any(map(alive, pids)) and time.monotonic() < until:
            time.sleep(0.1)
        assert len(pids) == 2
        assert not any(map(alive, pids))
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([1, 64], 64),  # the one that knew why, and one that lost its peer
        ([1, -9], 137),
        ([1, -15], 1),  # ended because the other one had failed
        ([143, 1], 1),
        ([143, -9], 137),
        ([-15, -15], 143),
        ([0, 71], 71),
    ],
)
def test_the_code_that_says_most(codes: list[int], told: int) -> None:
    assert telling_code(codes) == told
