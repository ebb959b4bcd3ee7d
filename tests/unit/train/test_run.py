"""What a run says before its first step."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ds_longft.config.run_config import RunConfig
from ds_longft.ranks.interrupt import StopRequest
from ds_longft.ranks.join import Launch
from ds_longft.ranks.lock import lock_folder
from ds_longft.run_files import StatusFile
from ds_longft.stored import read_file
from ds_longft.train.run import _farewell, _header
from ds_longft.train.start import Phases, epochs_in_steps
from ds_longft.train.status import STATUS, Status
from tests.distributed.models import tiny_config


@pytest.mark.parametrize(("section", "key"), [("optim", "warmup_steps"), ("train", "max_steps")])
@pytest.mark.parametrize(("steps", "said"), [(5, True), (4, False), (None, False)])
def test_steps_that_the_epochs_never_reach_are_said(
    section: str, key: str, steps: int | None, said: bool, tmp_path: Path
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    config = RunConfig.model_validate({"model": {"path": str(tmp_path)}, section: {key: steps}})
    layout: Any = SimpleNamespace(world=1, sp=1, dp=1)
    loader: Any = SimpleNamespace(steps_per_epoch=lambda epoch: 4, budget_tokens=64)
    state = cast(Any, SimpleNamespace(epoch=0, total_steps=4, step=0))
    text = _header(config, layout, torch.device("cpu"), loader, state, None)
    assert (f"{section}.{key} is 5" in text) == said


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (2, 21), (0.5, 5), (1.5, 16), (0.01, 1), (2.25, 24)])
def test_epochs_may_be_parts(epochs: float, steps: int) -> None:
    assert epochs_in_steps(epochs, lambda epoch: 10 + epoch) == steps


def test_epochs_behind_the_last_step_are_not_planned() -> None:
    """`epochs: 700` beside `max_steps: 700` costs no 700 plans."""
    planned: list[int] = []
    assert epochs_in_steps(700, lambda epoch: planned.append(epoch) or 10, at_most=25) == 25
    assert planned == [0, 1, 2]
    assert epochs_in_steps(2.5, lambda _: 10, at_most=100) == 25
    assert epochs_in_steps(2.5, lambda _: 10, at_most=22) == 22


def test_each_phase_of_the_start_is_said_as_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases(time.monotonic(), say=True)
    phases.done("model loaded", "the engine is built")
    assert re.fullmatch(r" +0\.\d s  model loaded; the engine is built \.\.\.\n", capsys.readouterr().out)


def test_a_start_that_fails_early_says_so_unless_another_run_has_the_folder(tmp_path: Path) -> None:
    status = Status(Launch(rank=0, world=1, local_rank=0, local_world=1))
    status.output = tmp_path
    lock = lock_folder(tmp_path, patience_s=0.0)
    status.write(64)
    assert not (tmp_path / STATUS).exists(), "the status there is the other run's"
    lock.release()
    status.write(64)
    assert read_file(tmp_path / STATUS, StatusFile).exit_code == 64
    lock_folder(tmp_path, patience_s=0.0).release()


@pytest.mark.parametrize(
    ("resume", "says"),
    [("auto", "The same command goes on"), (6, "begins at step 6 again"), ("never", "begins over again")],
)
def test_the_farewell_tells_what_the_same_command_does(resume: str | int, says: str) -> None:
    trainer: Any = SimpleNamespace(state=SimpleNamespace(step=8))
    assert says in _farewell(trainer, StopRequest(), resume)
