"""F7, F8: USR1, USR2, TERM and the end of the time. One agreed step, saved, exit 75, and an exact resume."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ds_longft.ranks.interrupt import SAVE_MARGIN, StopRequest
from tests.faults.ranks import CRASH, Launcher, checkpoints, status, trace

CASES = [
    # fault, ranks it happens on, step that is saved
    ({"point": "step", "step": 3, "do": "SIGUSR1"}, [1], 2),  # between the packs of step 3: it is given up
    pytest.param({"point": "step", "step": 5, "do": "SIGUSR2"}, [0, 1], 4, marks=pytest.mark.slow),
    ({"point": "update", "step": 5, "do": "SIGTERM"}, [0], 5),  # too late for step 5's sums: seen before the next pack
    pytest.param({"point": "save_shard", "step": 4, "do": "SIGTERM"}, [0], 4, marks=pytest.mark.slow),
    pytest.param(
        {"point": "eval", "step": 4, "do": "SIGUSR2"}, [1], 4, marks=pytest.mark.slow
    ),  # the evaluation is made up for
]


@pytest.mark.parametrize(("fault", "ranks", "saved"), CASES)
def test_signal(launcher: Launcher, golden: Path, tmp_path: Path, fault: dict, ranks: list[int], saved: int) -> None:
    output = tmp_path / "out"
    if fault["point"] == "save_shard":
        fault = {**fault, "point": "save_seal"}  # the shard itself must stay whole
    codes, run = launcher.run(output, faults=dict.fromkeys(ranks, fault))
    assert codes == [75, 75], run.text()
    assert status(output)["exit_code"] == 75
    stopped = checkpoints(output)[-1]
    assert stopped in (saved, saved + 1 if fault["point"] == "update" else saved)
    assert f"stopped after step {stopped}" in run.text(0)
    codes, run = launcher.run(output)
    assert codes == [0, 0], run.text()
    assert f"at step {stopped}" in run.text(0)
    assert trace(output) == trace(golden)


def test_an_evaluation_made_up_for_twice_is_recorded_once(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    """Stopped in it; the next start makes up for it and is killed before it saves; so does the one after."""
    output = tmp_path / "out"
    for fault, code in (
        ({"point": "eval", "step": 4, "do": "SIGUSR2"}, 75),
        ({"point": "step", "step": 5, "do": "kill"}, CRASH),
    ):
        codes, run = launcher.run(output, faults={0: fault})
        assert codes[0] == code, run.text()
    assert (4, "eval") in [record[:2] for record in trace(output)]
    codes, run = launcher.run(output)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)


def test_signals_to_all_ranks_twice_from_outside(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    """The second ones arrive while the first are being obeyed."""
    output = tmp_path / "out"
    slow = {"point": "save_seal", "step": 4, "do": "sleep", "seconds": 1.0}
    run = launcher.start(output, faults={0: slow, 1: slow})
    run.wait_for((output / ".tmp-checkpoint-4").exists)
    run.signal(signal.SIGTERM)
    run.signal(signal.SIGUSR2)
    run.signal(signal.SIGTERM)
    assert run.wait() == [75, 75], run.text()
    assert checkpoints(output) == [2, 4]
    codes, run = launcher.run(output)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)


def test_before_the_first_step(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(output, faults={1: {"point": "start", "do": "SIGUSR2"}})
    assert codes == [75, 75], run.text()
    assert checkpoints(output) == []
    assert "nothing was trained yet" in run.text(0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR2, 75)])
def test_while_a_peer_is_waited_for(launcher: Launcher, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The peer died before it joined: nobody can agree on a stop, and the rendezvous would wait half an hour."""
    run = launcher.start(tmp_path / "out")
    run.processes[1].kill()
    run.wait_for(lambda: "processes join ..." in run.text(0))
    run.signal(number, 0)
    assert run.wait(20) == [code, CRASH], run.text()
    assert f"signal {number.name} before the ranks had joined: nothing was trained" in run.text(0)


def test_time_is_up(launcher: Launcher, tmp_path: Path) -> None:
    """SLURM says when the job ends; the run leaves before, on all ranks, although only one sees the clock."""
    import time

    output = tmp_path / "out"
    slow = {"point": "every_step", "do": "sleep", "seconds": 0.5}
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 9)}
    codes, run = launcher.run(
        output, "--train.epochs", "50", faults={0: slow, 1: slow}, rank_env=lambda rank: end if rank else {}
    )
    assert codes == [75, 75], run.text()
    assert "stopped after step" in run.text(0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_margin_is_one_and_a_half_times_the_longest_save_plus_a_round() -> None:
    clock = Clock()
    stop = StopRequest(clock)
    stop.set_budget(10.0, env={})
    stop.saved(40.0)
    stop.saved(20.0)
    asked_at = None
    while asked_at is None:
        clock.now += 7.0  # one pack
        if stop.asked():
            asked_at = clock.now
    left = 1000.0 + 600.0 - asked_at
    assert SAVE_MARGIN * 40 <= left <= SAVE_MARGIN * 40 + 7 + 7
    assert stop.reason is not None
    assert "time is up" in stop.reason


def test_the_earlier_end_counts_and_none_means_none() -> None:
    clock = Clock()
    stop = StopRequest(clock, clock)
    stop.set_budget(10.0, env={"SLURM_JOB_END_TIME": "1300"})
    assert stop.left_s() == 300.0
    stop.set_budget(None, env={})
    assert not stop.asked()


def test_margin_before_any_save_is_a_minute_or_a_tenth() -> None:
    clock = Clock()
    stop = StopRequest(clock)
    stop.set_budget(60.0, env={})
    assert stop.margin_s == SAVE_MARGIN * 60
    stop.set_budget(1.0, env={})
    assert stop.margin_s == SAVE_MARGIN * 6
