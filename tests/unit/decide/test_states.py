"""Layers that carry a state in the plan: which layer is what, what it costs, and how that grows with the length."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from benchmarks.work import SHAPES, shape_of
from ds_longft.decide.memory import predict
from ds_longft.decide.search import fastest_saver
from ds_longft.decide.setting import GIB, Gpu, Setting
from ds_longft.decide.state_time import passes_of
from ds_longft.decide.tensors import Keep, Sizes
from ds_longft.decide.time import predict_time
from ds_longft.decide.work import multiplied_weights
from ds_longft.model.facts import ModelFacts, StateFacts

GPU = Gpu.load("h200")
HYBRIDS = {name: ModelFacts.from_config(AutoConfig.for_model(**SHAPES[name])) for name in ("hybrid8b", "mamba8b")}


def test_layers_are_told_apart() -> None:
    deltas, attention = HYBRIDS["hybrid8b"].kinds
    assert (deltas.state, deltas.attends) == (StateFacts("delta", 32, 16, 128, 128, 8192), False)
    assert (attention.state, attention.attends) == (None, True)
    assert list(HYBRIDS["hybrid8b"].kinds.values()) == [24, 8]
    mamba, mlp, softmax = HYBRIDS["mamba8b"].kinds
    assert (mamba.state, mamba.inter) == (StateFacts("decay", 128, 8, 128, 64, 10240), 0)
    assert (mlp.state, mlp.attends, mlp.inter) == (None, False, 21504)
    assert (softmax.attends, softmax.inter) == (True, 0)


@pytest.mark.parametrize("model", HYBRIDS.values(), ids=HYBRIDS)
def test_all_linears_are_multiplied(model: ModelFacts) -> None:
    """Full recomputation and frozen weights: forward, again without the last product, input gradients."""
    x = Setting((65536,), recompute="full", targets=0.0)
    downs = sum(count * i * o for of, count in model.kinds.items() for n, i, o in of.linear_io if n == "down_proj")
    first = sum(i * o for n, i, o in model.by_layer[0].linear_io if n.startswith("in_proj"))
    assert multiplied_weights(model, x, (Keep(),) * model.layers) == 3 * model.body_weights - downs - first


@pytest.mark.parametrize("model", HYBRIDS.values(), ids=HYBRIDS)
def test_states_cost_the_same_for_each_token(model: ModelFacts) -> None:
    seconds = []
    for tokens in (32768, 65536):  # all heads at once
        x = Setting((tokens,), recompute="full", tile_tokens=8192)
        seconds.append(predict_time(model, x, GPU, (Keep(),) * model.layers).parts)
    short, long = seconds
    assert long["layers with a state"] == pytest.approx(2 * short["layers with a state"])
    assert long["attention"] > 3.5 * short["attention"]


def test_states_of_long_packs_are_worked_on_in_turns() -> None:
    """More states than `STATE_BYTES`: a turn holds as much as at that length, and where memory is short a quarter."""
    delta = HYBRIDS["hybrid8b"].by_layer[0]
    whole, turns, few = (
        Sizes(delta, Setting((tokens,), kv_heads=heads)).state
        for tokens, heads in ((131072, None), (524288, None), (524288, 1))
    )
    assert whole is not None
    assert turns is not None
    assert few is not None
    assert (whole.turns, turns.turns, few.turns) == (1, 4, 16)
    assert turns.backward / turns.turns == whole.backward


# Seconds of one step on H200s (benchmarks/step.py, one configuration of each of FLA's kernels). On two GPUs a piece of
# the backward pass was still torch's: some 0.6 s of the first, by that piece alone.
MEASURED = {
    "one GPU": ("hybrid8b", Setting((131072,), stage=2), 17.86),
    "Mamba-2": ("mamba8b", Setting((131072,), stage=2), 19.24),
    "two GPUs": ("hybrid8b", Setting((131072,), 2, 2, stage=2), 9.92),
    "two GPUs, in turns": ("hybrid8b", Setting((524288,), 2, 2, stage=2), 84.44),
}


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_meet_measured_steps(name: str) -> None:
    shape, x, seconds = MEASURED[name]
    model = ModelFacts.from_config(AutoConfig.for_model(**shape_of(shape, None)))
    x = fastest_saver(model, x, GPU)
    assert predict_time(model, x, GPU, predict(model, x, GPU).keep).total_s == pytest.approx(seconds, rel=0.06)


def test_few_heads_in_many_turns_take_longer() -> None:
    """Four turns of eight heads go through four times as many chunks, one after another; documents side by side do not."""
    delta = HYBRIDS["hybrid8b"].by_layer[0].state
    assert delta is not None
    one, four, packed = (passes_of(delta, Setting(lengths))[0] for lengths in ((131072,), (524288,), (16384,) * 8))
    assert four.chunks == 16 * one.chunks
    assert packed.chunks < one.chunks
    assert packed.kernels == one.kernels


def test_heads_of_states_are_split_over_ranks() -> None:
    delta = HYBRIDS["hybrid8b"].by_layer[0]
    one, two = (Sizes(delta, Setting((131072,), sp, sp)).state for sp in (1, 2))
    assert one is not None
    assert two is not None
    assert two.backward == one.backward / 2
    assert two.saved == one.saved / 2


def test_a_long_pack_is_recomputed_until_it_fits() -> None:
    model = HYBRIDS["mamba8b"]
    asked = Setting((196608,), stage=2, host_gib=100.0)
    found = fastest_saver(model, asked, GPU, 100.0)
    assert predict(model, found, GPU).fits(GPU, 100.0)
    assert not predict(model, replace(asked, host_gib=0.0), GPU).fits(GPU)


def test_kept_projections_are_not_computed_again() -> None:
    model, x = HYBRIDS["hybrid8b"], Setting((32768,))
    kept = (Keep(state="device"),) * model.layers
    fewer = multiplied_weights(model, x, (Keep(),) * model.layers) - multiplied_weights(model, x, kept)
    assert fewer == 24 * 4096 * (8192 + 4096 + 32 + 32)
    memory = predict(model, x, GPU)
    assert memory.peak < GPU.memory_gib * GIB
    assert any(keep.state for keep in memory.keep)
