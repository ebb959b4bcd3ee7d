"""No key is silently without effect: each is refused where it would be, and taken where it has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_longft.config.read import config_of_run, load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError

DATA = ("--data.train", "a.jsonl")


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        (("--train.eval_every_steps", "5"), ("--data.eval_fraction", "0.1")),
        (("--train.eval_every_steps", "5"), ("--data.eval", "b.jsonl")),
        (("--train.recompute_every", "3"), ("--train.recompute", "every_k")),
        (("--train.max_skipped_in_a_row", "5"), ("--train.on_nonfinite", "skip")),
        (("--log.project", "mine"), ("--log.trackers", "wandb")),
        (("--log.name", "mine"), ("--log.wandb", "offline")),
    ],
)
def test_a_key_that_needs_another(given: tuple[str, ...], instead: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config([*DATA, *given])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{given[0].removeprefix('--')} is {given[1]}, but ")
    load_run_config([*DATA, *given, *instead])


@pytest.mark.parametrize(
    ("given", "beside"),
    [
        (("--data.pack_tokens", "8192"), ("--data.packing", "none")),
        (("--train.offload_host_gib", "8"), ("--train.recompute", "none")),
        (("--optim.min_lr_ratio", "0.5"), ("--optim.schedule", "constant")),
    ],
)
def test_a_key_that_another_one_leaves_nothing_to_do(given: tuple[str, ...], beside: tuple[str, ...]) -> None:
    load_run_config([*DATA, *given])
    with pytest.raises(ConfigError) as caught:
        load_run_config([*DATA, *given, *beside])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{given[0].removeprefix('--')} is {given[1]}, but {beside[0].removeprefix('--')} is")


def test_what_a_run_wrote_is_read_although_rules_came_later(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {eval_every_steps: 5}\ndata: {train: a.jsonl}\n")
    assert isinstance(config_of_run(tmp_path), RunConfig)
    (tmp_path / "config.yaml").write_text("train: {eval_evry_steps: 5}\n")
    with pytest.raises(ConfigError, match="eval_every_steps"):
        config_of_run(tmp_path)
