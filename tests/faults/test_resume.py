"""F17, F18: a resume at another sp, and at another number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.ranks import Launcher, checkpoints, trace

PLAIN = ("--lora.dropout", "0")  # dropout draws depend on which rank draws them


def stage(folder: Path, number: int) -> tuple[str, str]:
    path = folder / f"zero{number}.json"
    path.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": number}}))
    return "--ds_config", str(path)


def assert_close(output: Path, expected: list) -> None:
    for ours, theirs in zip(trace(output), expected, strict=True):
        assert ours[0] == theirs[0]
        assert [x for x in ours[1:] if x != "eval"] == pytest.approx([x for x in theirs[1:] if x != "eval"], rel=1e-5)


def cut(output: Path) -> list:
    """Take the last checkpoint away: the trace that the rest of the run has to repeat."""
    shutil.rmtree(output / "checkpoint-8")
    return trace(output)


WORLDS = [
    # stage, then (ranks, sp, accumulation) before and after: two packs a step each time
    (3, (2, 2, 2), (2, 1, 1)),  # F17
    pytest.param(3, (2, 1, 1), (2, 2, 2), marks=pytest.mark.slow),
    (3, (2, 2, 2), (1, 1, 2)),  # F18
    (2, (1, 1, 2), (2, 2, 2)),
    pytest.param(3, (1, 1, 2), (2, 1, 1), marks=pytest.mark.slow),
    pytest.param(2, (2, 2, 2), (1, 1, 2), marks=pytest.mark.slow),
    pytest.param(1, (2, 2, 2), (1, 1, 2), marks=pytest.mark.slow),
    pytest.param(1, (1, 1, 2), (2, 2, 2), marks=pytest.mark.slow),
    pytest.param(0, (2, 2, 2), (1, 1, 2), marks=pytest.mark.slow),
    pytest.param(0, (1, 1, 2), (2, 2, 2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("zero", "before", "after"), WORLDS)
def test_other_layout(launcher: Launcher, tmp_path: Path, zero: int, before: tuple, after: tuple) -> None:
    output = tmp_path / "out"
    for world, sp, accumulation in (before, after):
        keys = (
            *stage(tmp_path, zero),
            *PLAIN,
            "--sp",
            str(sp),
            "--train.gradient_accumulation_steps",
            str(accumulation),
        )
        codes, run = launcher.run(output, *keys, world=world)
        assert not any(codes), run.text()
        if (world, sp, accumulation) == before:
            expected = cut(output)
    assert "resumed from" in run.text(0)
    if before[0] != after[0]:
        assert f"was written by {before[0]} ranks" in run.text(0)
    assert_close(output, expected)
    assert checkpoints(output) == [6, 8]
    assert not list(output.glob(".universal-*"))


@pytest.mark.parametrize(("zero", "lora"), [pytest.param(3, '{"r": 4}', marks=pytest.mark.slow), (2, "null")])
def test_in_bf16(launcher: Launcher, tmp_path: Path, zero: int, lora: str) -> None:
    """Gradients are summed in float32 then; the weights and the optimizer go on from the last digit."""
    output = tmp_path / "out"
    keys = (*stage(tmp_path, zero), "--model.dtype", "bf16", "--lora", lora, "--train.gradient_accumulation_steps", "2")
    codes, run = launcher.run(output, *keys, "--sp", "2")
    assert not any(codes), run.text()
    assert '"grad_accum_dtype": "fp32"' in (output / "ds_config.json").read_text()
    expected = trace(output)
    cut(output)
    codes, run = launcher.run(output, *keys, "--sp", "2")
    assert not any(codes), run.text()
    assert "resumed from" in run.text(0)
    assert trace(output) == expected


OPTIMIZERS = [
    # type, ZeRO stage, other keys
    ("schedule_free", 2, ("--optim.schedule", "constant")),
    pytest.param("muon", 3, ("--optim.max_grad_norm", "null"), marks=pytest.mark.slow),
    pytest.param("adamw_8bit", 2, (), marks=pytest.mark.slow),
    pytest.param("adafactor", 0, (), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "zero", "keys"), OPTIMIZERS)
def test_each_optimizer(launcher: Launcher, tmp_path: Path, kind: str, zero: int, keys: tuple) -> None:
    """Evaluated, saved, stopped and continued to the bit; the adapter of a save is the one that was evaluated."""
    output = tmp_path / "out"
    keys = (*stage(tmp_path, zero), "--optim.type", kind, *keys)
    codes, run = launcher.run(output, *keys)
    assert not any(codes), run.text()
    whole = (output / "adapter_model.safetensors").read_bytes()
    assert (output / "checkpoint-8" / "adapter_model.safetensors").read_bytes() == whole
    expected = cut(output)
    codes, run = launcher.run(output, *keys)
    assert not any(codes), run.text()
    assert "resumed from" in run.text(0)
    assert trace(output) == expected
    assert (output / "adapter_model.safetensors").read_bytes() == whole


def test_explicit_step_and_retention(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    """Going back to an older step: the newer checkpoint is set aside, kept, and never resumed by itself."""
    output = Path(shutil.copytree(golden, tmp_path / "out"))
    codes, run = launcher.run(output, "--train.resume", "6")
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)
    assert checkpoints(output) == [6, 8]
    assert "set-aside-checkpoint-8" in run.text(0)
    codes, run = launcher.run(output, "--train.resume", "7")
    assert codes == [64, 64]
    assert "holds no checkpoint-7" in run.text(0)
