"""Runs through the real command line that must be the same training: one loss and gradient-norm curve over 20 steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.user_files import user_config
from tests.faults.ranks import Launcher

STEPS = 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """A job whose epochs end in a step with too few packs, with SGD: Adam would hide a wrong scale."""
    folder = tmp_path_factory.mktemp("job")
    content = user_config(folder, rows=30)
    content["data"] |= {"eval_fraction": 0.2, "max_length_tokens": 160}
    content["optim"] = {"type": "sgd", "learning_rate": 0.3, "max_grad_norm": None, "warmup_steps": 2}
    content["train"] = {"epochs": 30, "max_steps": STEPS, "eval_every_steps": 10, "resume": "never"}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    launcher = Launcher(path)
    yield launcher
    launcher.close()


def curve(
    job: Launcher, output: Path, world: int, sp: int, accumulation: int, stage: int, *keys: str
) -> list[dict[str, Any]]:
    """metrics.jsonl of a run."""
    ds = output.with_suffix(".json")
    ds.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    codes, run = job.run(
        output, "--sp", str(sp), "--train.gradient_accumulation_steps", str(accumulation), "--ds_config", str(ds), *keys,
        world=world, timeout_s=180,
    )  # fmt: skip
    assert codes == [0] * world, run.text()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def base(job: Launcher, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process, four packs a step."""
    records = curve(job, tmp_path_factory.mktemp("base") / "out", 1, 1, 4, 0)
    steps = [r for r in records if "loss" in r]
    assert len(steps) == STEPS
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]  # it trains
    assert len({round(r["targets_weight"]) for r in steps}) > 3  # full and partial steps
    return records


def assert_same(records: list[dict[str, Any]], base: list[dict[str, Any]]) -> None:
    assert len(records) == len(base)
    for ours, truth in zip(records, base, strict=True):
        for key in (
            "step",
            "loss",
            "grad_norm",
            "eval_loss",
            "eval_targets",
            "learning_rate",
            "targets_weight",
            "tokens_seen",
        ):
            if truth.get(key) is not None:
                assert ours[key] == pytest.approx(truth[key], rel=1e-5), (truth["step"], key)


@pytest.mark.parametrize(
    ("world", "sp", "accumulation", "stage", "keys"),
    [
        (2, 2, 4, 3, ("--train.recompute", "sqrt")),
        (2, 1, 2, 1, ()),
        (2, 2, 4, 2, ("--train.verify_first", "true")),
        pytest.param(4, 2, 2, 3, ("--train.recompute", "none"), marks=pytest.mark.slow),
    ],
    ids=["sp2_zero3", "dp2_zero1", "sp2_zero2_verified_first", "sp2_dp2_zero3"],
)
def test_same_curve(job, base, tmp_path, world, sp, accumulation, stage, keys):
    assert_same(curve(job, tmp_path / "out", world, sp, accumulation, stage, *keys), base)


def test_packing_does_not_change_the_curve(job, tmp_path):
    """Steps that hold the whole data set: packed or not, the same rows."""
    rows = ("--data.eval_fraction", "0", "--train.eval_every_steps", "null", "--train.max_steps", "4")
    packed = curve(job, tmp_path / "packed", 1, 1, 30, 0, *rows)
    single = curve(job, tmp_path / "single", 2, 2, 30, 1, *rows, "--data.packing", "none")
    assert_same(single, packed)
