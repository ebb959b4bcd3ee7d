"""What decides between one pass and two, as far as it needs no GPU: what is open, and what the plan has said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from schedulefree import AdamWScheduleFree
from torch import nn
from transformers import Adafactor

from ds_longft.layout import ParallelLayout
from ds_longft.objectives.dpo import DpoObjective
from ds_longft.train import rehearse
from ds_longft.train.device_memory import DeviceMemory
from ds_longft.train.make_optimizer import forget_steps


def objective(passes: Literal["one", "two"]) -> DpoObjective:
    made = DpoObjective.__new__(DpoObjective)
    nn.Module.__init__(made)
    made.passes = passes
    return made


@pytest.mark.parametrize(
    ("wanted", "planned", "device", "says"),
    [
        ("auto", "two", "cuda", "dpo.passes auto: two"),
        ("two", "two", "cuda", None),
        ("one", "one", "cuda", None),
        ("auto", "one", "cpu", None),
    ],
)
def test_what_is_settled_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, wanted: str, planned: Any, device: str, says: str | None
) -> None:
    def measured(*_: Any) -> None:
        raise AssertionError("a rehearsal was run")

    monkeypatch.setattr(rehearse, "backpropagate_pack", measured)
    engine, pack = SimpleNamespace(module=objective(planned)), SimpleNamespace(tokens=8)
    memory = DeviceMemory(torch.device(device)) if device == "cuda" else None
    line = rehearse.choose_passes(engine, wanted, pack, ParallelLayout(1, 0, 1), torch.device(device), memory)  # type: ignore[arg-type]
    assert line is None if says is None else (line or "").startswith(says)
    assert engine.module.passes == planned


def test_a_dry_pass_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is not rehearsed, on a CPU, draws the same dropout."""
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(rehearse, "backpropagate_pack", lambda *_: drawn.append(torch.rand(3)))
    torch.manual_seed(0)
    rehearse.dry_pass(None, SimpleNamespace(tokens=8), ParallelLayout(1, 0, 1), torch.device("cpu"))  # type: ignore[arg-type]
    torch.testing.assert_close(torch.rand(3), drawn[0])


def schedule_free(p: nn.Parameter) -> Any:
    made = AdamWScheduleFree([p], lr=0.1)
    made.train()
    return made


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW([p], lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: Adafactor([p], lr=0.1, scale_parameter=False, relative_step=False),
        lambda p: AdamW8bit([p], lr=0.1, min_8bit_size=0),
        schedule_free,
    ],
)
def test_a_first_step_after_a_forgotten_one_is_a_first_step(optimizer: Any) -> None:
    first, second = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    plain, stepped = optimizer(first), optimizer(second)
    second.grad = torch.zeros(3, 2)
    for group in stepped.param_groups:
        group.update(lr=0.0)
    stepped.step()
    for group in stepped.param_groups:
        group.update(lr=0.1)
    forget_steps(stepped)
    for parameter, each in ((first, plain), (second, stepped)):
        for _ in range(2):
            parameter.grad = torch.full((3, 2), 0.5)
            each.step()
    assert torch.equal(first, second)
