"""Every optimizer through the engine, three steps in float32: what sp, dp and ZeRO may change of the weights, a resume, and
the weights that schedule-free shows.

SGD and AdamW treat each number by itself, and so does schedule-free: the same weights to rounding everywhere. Adafactor
and Muon see whole matrices, and are held to the same where they may run. Moments of a byte are rounded in blocks of 256
numbers, of other ones under ZeRO: there the distance to AdamW is what is bounded.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from ds_longft.model.lora import gather_adapter_state
from ds_longft.train.elastic import own_settings
from ds_longft.train.make_optimizer import averaged_weights, set_learning_rate
from ds_longft.train.rehearse import settle
from ds_longft.train.step import apply_step, backpropagate
from ds_longft.train.weights import gather_weights
from tests.distributed.models import built_run, tiny_config
from tests.distributed.test_engine import packs_of_step

CPU = torch.device("cpu")
PACKS = 4
LORA = {"r": 4, "alpha": 8}
OPTIM: dict[str, dict[str, Any]] = {
    "adamw": {"eps": 1e-5},
    "adamw_8bit": {},
    "adafactor": {"learning_rate": 1e-2},
    "schedule_free": {"schedule": "constant", "eps": 1e-5},
    "muon": {"learning_rate": 2e-2, "max_grad_norm": None, "adam_learning_rate": 1e-3},
}

NEAR = 5e-5
"""Of a tensor's largest weight. Adam divides a gradient by its own size, so that one that is rounding itself would move
its weight by a whole step of 1e-3: `eps` stands above that. One process and two ranks then differ by up to 2e-5 here."""
EIGHT_BITS = 0.1
RATES = {"muon": 1e-2, "adafactor": 1e-2}


def weights_of(engine: Any, lora: bool) -> dict[str, torch.Tensor]:
    model = engine.module.model
    return {n: p.clone() for n, p in (gather_adapter_state(model) if lora else gather_weights(model)).items()}


def steps(engine: Any, layout: Any, numbers: range, lr: float) -> None:
    """Optimizer steps of four packs each, the same ones whatever the layout."""
    for number in numbers:
        packs = packs_of_step(PACKS // layout.dp, layout.dp, layout.sp, False, False)
        weight = sum(float(p.loss_weights.sum(dtype="float64")) for p in packs)
        set_learning_rate(engine, lr * (number + 1))
        loss = backpropagate(engine, packs[layout.dp_rank :: layout.dp], weight, layout, CPU)
        dist.all_reduce(loss)
        assert apply_step(engine, float(loss), skip=False)[0] is None


def built(folder: str, world: int, kind: str, stage: int, sp: int, lora: bool, rehearsed: bool = False) -> Any:
    keys: dict[str, Any] = {"optim": {"type": kind, "weight_decay": 0.1, **OPTIM[kind]}, "lora": LORA if lora else None}
    keys |= {
        "model": {"path": folder},
        "data": {"train": ["unused.jsonl"], "max_length_tokens": 512},
        "sp": sp,
        "train": {"gradient_accumulation_steps": PACKS // (world // sp), "recompute": "full"},
    }
    run, layout = built_run(folder, {"zero_optimization": {"stage": stage}}, world, **keys)
    if rehearsed:
        settle(run.engine, layout, CPU)
    return run.engine, layout


IN_FLOAT32 = "deepspeed.runtime.zero.muon.original_muon.ns_compute_dtype"
"""Where the processor multiplies in half precision, Muon iterates in it, and gradients that differ by their rounding
come out up to 2e-3 apart: of the machine, not of ranks."""


def trained(rank: int, world: int, folder: str, kind: str, stage: int, sp: int, lora: bool, rehearsed: bool) -> Any:
    engine, layout = built(folder, world, kind, stage, sp, lora, rehearsed)
    with patch(IN_FLOAT32, lambda *_: torch.float32):
        steps(engine, layout, range(3), RATES.get(kind, 1e-3))
    found = weights_of(engine, lora)
    with averaged_weights(engine):
        shown = weights_of(engine, lora)
    after = weights_of(engine, lora)
    assert all(torch.equal(after[name], found[name]) for name in found), "an evaluation changed what is trained"
    engine.destroy()
    return (found, shown) if rank == 0 else None


def resumed(rank: int, world: int, folder: str, work: str, kind: str, stage: int, lora: bool) -> Any:
    """Whether two steps, a checkpoint in a new engine that was rehearsed, and two more are four to the bit."""
    engine, layout = built(folder, world, kind, stage, 2, lora)
    steps(engine, layout, range(2), RATES.get(kind, 1e-3))
    with averaged_weights(engine):  # an evaluation, and a save
        pass
    engine.save_checkpoint(work, tag="half", save_latest=False, exclude_frozen_parameters=True)
    steps(engine, layout, range(2, 4), RATES.get(kind, 1e-3))
    whole = weights_of(engine, lora)
    engine.destroy()
    engine, layout = built(folder, world, kind, stage, 2, lora, rehearsed=True)
    with own_settings(engine):
        engine.load_checkpoint(work, tag="half", load_module_strict=False)
    steps(engine, layout, range(2, 4), RATES.get(kind, 1e-3))
    again = weights_of(engine, lora)
    engine.destroy()
    return {name: torch.equal(again[name], tensor) for name, tensor in whole.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(tiny_config("llama", initializer_range=0.05)).float().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def alone(pools: Any, folder: str) -> Any:
    """Weights after three steps of one process without ZeRO, each kind once."""
    known: dict[tuple[str, bool], Any] = {}

    def of(kind: str, lora: bool) -> Any:
        if (kind, lora) not in known:
            known[kind, lora] = pools(1).run(trained, folder, kind, 0, 1, lora, False)[0]
        return copy.deepcopy(known[kind, lora])

    return of


def distances(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight, of the largest weight of its tensor."""
    assert found.keys() == truth.keys()
    return max(float((found[n] - truth[n]).abs().max() / truth[n].abs().max().clamp_min(1e-3)) for n in truth)


CASES = [
    # kind, world, ZeRO stage, sp, LoRA, rehearsed
    ("adamw", 2, 3, 2, True, True),
    ("adafactor", 2, 0, 2, True, True),
    pytest.param("adafactor", 2, 0, 2, False, False, marks=pytest.mark.slow),
    pytest.param("schedule_free", 2, 0, 2, True, False, marks=pytest.mark.slow),
    ("schedule_free", 2, 1, 2, False, False),
    ("schedule_free", 2, 2, 2, True, True),
    pytest.param("schedule_free", 2, 2, 1, False, False, marks=pytest.mark.slow),
    pytest.param("muon", 2, 0, 2, True, True, marks=pytest.mark.slow),
    ("muon", 2, 1, 2, False, False),
    pytest.param("muon", 2, 2, 2, True, True, marks=pytest.mark.slow),
    ("muon", 2, 2, 1, False, True),
    pytest.param("muon", 2, 3, 2, True, True, marks=pytest.mark.slow),
    ("muon", 2, 3, 2, False, False),
    ("adamw_8bit", 2, 0, 2, False, True),  # whole parameters on every rank: the same blocks
]


@pytest.mark.parametrize(("kind", "world", "stage", "sp", "lora", "rehearsed"), CASES)
def test_weights_are_those_of_one_process(
    pools: Any, folder: str, alone: Any, kind: str, world: int, stage: int, sp: int, lora: bool, rehearsed: bool
) -> None:
    trained_weights, shown = pools(world).run(trained, folder, kind, stage, sp, lora, rehearsed)[0]
    truth, shown_truth = alone(kind, lora)
    assert distances(trained_weights, truth) < NEAR
    assert distances(shown, shown_truth) < NEAR
    differ = any(not torch.equal(shown[name], trained_weights[name]) for name in shown)
    assert differ == (kind == "schedule_free"), "what is evaluated is what is trained, or its average"


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_moments_of_a_byte_under_zero_are_those_of_adamw_to_their_rounding(
    pools: Any, folder: str, alone: Any, stage: int
) -> None:
    found, _ = pools(2).run(trained, folder, "adamw_8bit", stage, 2, False, True)[0]
    exact, _ = alone("adamw", False)
    assert NEAR < distances(found, exact) < EIGHT_BITS


@pytest.mark.parametrize(
    ("kind", "stage", "lora"),
    [
        pytest.param("adamw_8bit", 0, False, marks=pytest.mark.slow),
        pytest.param("adamw_8bit", 2, False, marks=pytest.mark.slow),
        ("adamw_8bit", 3, False),
        ("adafactor", 0, True),
        pytest.param("schedule_free", 0, True, marks=pytest.mark.slow),
        ("schedule_free", 2, False),
        pytest.param("muon", 0, True, marks=pytest.mark.slow),
        pytest.param("muon", 2, False, marks=pytest.mark.slow),
        ("muon", 3, False),
    ],
)
def test_a_resume_goes_on_to_the_bit(
    pools: Any, folder: str, tmp_path: Path, kind: str, stage: int, lora: bool
) -> None:
    found = pools(2).run(resumed, folder, str(tmp_path), kind, stage, lora)[0]
    assert [name for name, equal in found.items() if not equal] == []
