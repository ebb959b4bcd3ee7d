"""F1, F2, F7, F9 and a change of sp, on the GPUs of this machine: one rank, or two that share each sample."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.assets import write_job
from tests.faults.ranks import CRASH, Launcher, checkpoints, status, trace
from tests.faults.test_resume import cut, stage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device"),
]

WORLD = min(2, torch.cuda.device_count())
LAST = WORLD - 1
SP = ("--sp", str(WORLD))
NOISE = 2e-2
"""Relative, on the losses of single steps. The model computes in bf16, and kernels add up in any order."""


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    os.environ["LONGFT_TEST_ON_GPUS"] = "1"
    launcher = Launcher(write_job(tmp_path_factory.mktemp("job")))
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def golden(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("golden") / "out"
    return finish(launcher, output)


def finish(launcher: Launcher, output: Path, *keys: str) -> Path:
    codes, run = launcher.run(output, *SP, *keys, world=WORLD, timeout_s=200)
    assert codes == [0] * WORLD, run.text()
    return output


def assert_same_curve(output: Path, golden: Path) -> None:
    ours, theirs = trace(output), trace(golden)
    assert [row[:2] if row[1] == "eval" else row[0] for row in ours] == [
        row[:2] if row[1] == "eval" else row[0] for row in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        loss = 2 if a[1] == "eval" else 1
        assert a[loss] == pytest.approx(b[loss], rel=NOISE)


@pytest.mark.parametrize(
    ("point", "step", "newest"), [("step", 5, 4), ("save_shard", 4, 2), ("save_rename", 4, 2), ("save_done", 4, 4)]
)
def test_killed_rank(launcher: Launcher, golden: Path, tmp_path: Path, point: str, step: int, newest: int) -> None:
    rank = 0 if point in ("save_rename", "save_done") else LAST
    output = tmp_path / "out"
    run = launcher.start(output, *SP, world=WORLD, faults={rank: {"point": point, "step": step, "do": "kill"}})
    run.processes[rank].join(200)
    assert run.processes[rank].exitcode == CRASH, run.text()
    run.kill()  # as the launcher does: a rank that waits for NCCL does not know that its peer is gone
    assert newest in checkpoints(output)
    finish(launcher, output)
    assert_same_curve(output, golden)
    assert not list(output.glob(".tmp-*"))


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_signal(launcher: Launcher, golden: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(
        output, *SP, world=WORLD, timeout_s=200, faults={LAST: {"point": "step", "step": 3, "do": name}}
    )
    assert codes == [75] * WORLD, run.text()
    assert status(output)["exit_code"] == 75
    finish(launcher, output)
    assert_same_curve(output, golden)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite(launcher: Launcher, golden: Path, tmp_path: Path, what: str) -> None:
    output = tmp_path / "out"
    fault = {LAST: {"point": "poison", "step": 5, "what": what}}
    codes, run = launcher.run(output, *SP, world=WORLD, timeout_s=200, faults=fault)
    assert codes == [70] * WORLD, run.text()
    assert (output / "nonfinite-step-5.json").exists()
    assert max(checkpoints(output)) == 4
    finish(launcher, output)
    assert_same_curve(output, golden)


@pytest.mark.skipif(WORLD < 2, reason="needs two GPUs")
def test_resumed_with_another_sp(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    one = ("--sp", "1", "--train.gradient_accumulation_steps", "1", "--lora.dropout", "0")
    two = ("--sp", "2", "--lora.dropout", "0")
    codes, run = launcher.run(
        output, *one, world=WORLD, timeout_s=200, faults={0: {"point": "step", "step": 3, "do": "SIGUSR1"}}
    )
    assert codes == [75] * WORLD, run.text()
    finish(launcher, output, *two)
    expected = finish(launcher, tmp_path / "whole", *two)
    assert_same_curve(output, expected)


@pytest.mark.parametrize(
    ("kind", "zero", "keys"),
    [
        ("adamw_8bit", 2, ()),
        ("adafactor", 0, ()),
        ("schedule_free", 2, ("--optim.schedule", "constant")),
        ("schedule_free", 0, ("--optim.schedule", "constant")),
        ("muon", 2, ("--optim.max_grad_norm", "null")),
        ("muon", 3, ("--optim.max_grad_norm", "null")),
        ("muon", 0, ("--optim.max_grad_norm", "null")),
    ],
)
def test_each_optimizer_goes_on_to_the_bit(
    launcher: Launcher, tmp_path: Path, kind: str, zero: int, keys: tuple[str, ...]
) -> None:
    """In bf16, with its states on the GPU; `tests/distributed/test_optimizers.py` has what they compute."""
    keys = (*keys, *stage(tmp_path, zero), "--optim.type", kind, "--train.deterministic", "true")
    output = finish(launcher, tmp_path / "out", *keys)
    expected = cut(output)
    assert trace(finish(launcher, output, *keys)) == expected
