"""F11: a rank that makes no progress. Stacks of all living ranks, the section and the rank that lags, exit 71.

F12: a rank that is slow is named, and nothing else happens.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from ds_longft.train.health import hang_message
from tests.faults.ranks import Launcher, checkpoints, status

LIMIT = ("--train.hang_minutes", "0.07")  # 4.2 s


@pytest.mark.slow
def test_endless_loop(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(output, *LIMIT, faults={1: {"point": "update", "step": 3, "do": "loop"}})
    assert codes == [71, 71], run.text()
    stacks = (output / "hang-rank-00001.txt").read_text()
    assert "step 3" in stacks
    assert "faults.py" in stacks, "the line of the loop"
    assert (output / "hang-rank-00000.txt").exists()
    assert status(output)["exit_code"] == 71
    assert checkpoints(output) == [2]


def test_the_peer_that_left_first_is_not_the_reason(launcher: Launcher, tmp_path: Path) -> None:
    """Rank 0 sees its connection close while it is ending for the hang itself."""
    output = tmp_path / "out"
    report = str(output / "hang-rank-00000.txt")
    fault = {"point": "update", "step": 3, "do": "loop", "leaves_first": report}
    codes, run = launcher.run(output, *LIMIT, faults={1: fault})
    assert codes == [71, 71], run.text()
    assert status(output)["exit_code"] == 71
    assert "no progress" in status(output)["error"]


def test_stopped_rank(launcher: Launcher, tmp_path: Path) -> None:
    """SIGSTOP: the stopped one can say nothing, the other one names it."""
    output = tmp_path / "out"
    run = launcher.start(output, *LIMIT, faults={1: {"point": "update", "step": 3, "do": "SIGSTOP"}})
    run.processes[0].join(60)
    assert run.processes[0].exitcode == 71, run.text()
    assert "no answer from rank 1" in run.text(0)
    assert "step 3" in status(output)["error"]
    run.signal(signal.SIGKILL)
    run.wait()


def test_slow_rank(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(output, faults={1: {"point": "step", "step": 3, "do": "sleep", "seconds": 0.7}})
    assert codes == [0, 0], run.text()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    late = {r["step"]: (r["last_rank"], r["rank_spread_s"]) for r in lines if "step_s" in r}
    assert late[3][0] == 1
    assert late[3][1] > 0.6
    assert all(spread < 0.6 for step, (_, spread) in late.items() if step != 3)
    assert "(rank 1 0." in run.text(0)


def test_message_names_the_rank_behind() -> None:
    reports = {r: {"count": 9, "section": "step 5, sums and update"} for r in (0, 2, 3)}
    reports[1] = {"count": 8, "section": "step 5, pack 2 of 2"}
    text = hang_message(reports, 4, 1800)
    assert "rank 1 lags behind" in text
    assert "rank 1 in step 5, pack 2 of 2" in text
