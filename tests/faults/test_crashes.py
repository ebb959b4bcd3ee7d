"""F1, F2: a rank dies at any moment. Its peers end, nothing half-written is taken for a checkpoint, and the resume is
exact.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.faults.ranks import CRASH, Launcher, checkpoints, reached, status, trace

POINTS = [
    # point, step, rank that dies, newest complete checkpoint then
    ("step", 5, 1, 4),  # F1
    ("save_shard", 4, 1, 2),  # F2, as the other three
    pytest.param("save_seal", 4, 0, 2, marks=pytest.mark.slow),
    pytest.param("save_rename", 4, 0, 2, marks=pytest.mark.slow),
    pytest.param("save_done", 4, 0, 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("point", "step", "rank", "newest"), POINTS)
def test_killed_rank(
    launcher: Launcher, golden: Path, tmp_path: Path, point: str, step: int, rank: int, newest: int
) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(output, faults={rank: {"point": point, "step": step, "do": "kill"}}, timeout_s=40)
    assert codes[rank] == CRASH
    assert codes[1 - rank] not in (0, None), "the peer must end by itself, and not well"
    assert newest in checkpoints(output)
    codes, run = launcher.run(output)
    assert codes == [0, 0], run.text()
    assert f"resumed from {output}/checkpoint-{newest} at step {newest}" in run.text(0)
    assert trace(output) == trace(golden)
    assert not list(output.glob(".tmp-*"))


def test_failed_evaluation(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    """F29: the run ends badly, the checkpoints are as they were, and the same command goes on from them."""
    output = tmp_path / "out"
    codes, _ = launcher.run(output, faults={r: {"point": "eval", "step": 4, "do": "raise"} for r in (0, 1)})
    assert all(code not in (0, 75, None) for code in codes)
    assert checkpoints(output) == [2]
    assert status(output)["exit_code"] not in (0, None)
    codes, run = launcher.run(output)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)


def test_killed_while_loading(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    """The checkpoint that was being read is as good as before."""
    output = tmp_path / "out"
    shutil.copytree(golden, output)
    shutil.rmtree(output / "checkpoint-8")
    codes, _ = launcher.run(output, faults={1: {"point": "load", "do": "kill"}}, timeout_s=40)
    assert codes[1] == CRASH
    assert codes[0] not in (0, None)
    codes, run = launcher.run(output)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("kills", "steps"), [(200, 400)])
def test_soak_of_kills(launcher: Launcher, tmp_path: Path, kills: int, steps: int) -> None:
    """Kills -9 at random moments over one training: it finishes with the losses of an uninterrupted one."""
    save_every = 2
    keys = [
        *("--train.epochs", str(steps // 4), "--train.max_steps", str(steps)),
        *("--train.save_every_steps", str(save_every), "--train.eval_every_steps", "50"),
    ]
    expected, output = tmp_path / "expected", tmp_path / "out"
    run = launcher.start(expected, *keys)
    run.wait_for(lambda: reached(expected) > 0, timeout_s=300)
    start_s = time.monotonic() - run.started
    codes = run.wait(3600)
    assert codes == [0, 0], run.text()
    dice = random.Random(0)
    before = 0
    for killed in range(kills):
        run = launcher.start(output, *keys)
        time.sleep(dice.uniform(0.1, 1.4) * start_s)  # from joining over loading to training and saving
        run.signal(signal.SIGKILL, dice.randrange(2))
        codes = run.wait(5)  # then the other is ended, as launchers do: before they have met, it waits for its peer
        newest = max(checkpoints(output), default=0)
        assert newest >= before, "a checkpoint was lost"
        assert reached(output) - newest <= save_every, "more steps lost than between two saves"
        before = newest
        assert CRASH in codes, f"the training was over after {killed} kills: more steps are needed"
    codes, run = launcher.run(output, *keys, timeout_s=3600)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(expected)
    assert status(output)["exit_code"] == 0
