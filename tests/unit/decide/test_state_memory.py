"""Layers with a state in the memory model, against the code itself: every tensor of a step counted under fake tensors."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from benchmarks.work import SHAPES
from ds_longft.decide.setting import Setting
from ds_longft.decide.simulated_step import SimulatedStep
from ds_longft.decide.tensors import Keep, Sizes
from ds_longft.decide.timeline import Timeline
from tests.unit.decide.fla_like import like_fla
from tests.unit.decide.shapes import sizes
from tests.unit.decide.tracked import tracked_step

LONG = 131072
IN_PIECES: dict[str, Any] = {"recompute": "full", "tile_tokens": 8192, "kv_heads": 1}
NARROW = {"intermediate_size": 1024}

CASES: dict[str, tuple[dict[str, Any], int, Setting]] = {
    "delta": (SHAPES["hybrid8b"], 2, Setting((LONG,), recompute="full", tile_tokens=8192)),
    "delta, sp 2": (SHAPES["hybrid8b"], 2, Setting((LONG,), 2, 2, recompute="full")),
    "delta, heads in turns": (SHAPES["hybrid8b"], 2, Setting((4 * LONG,), 2, 2, **IN_PIECES)),
    "delta, heads in turns, narrow MLP": ({**SHAPES["hybrid8b"], **NARROW}, 2, Setting((4 * LONG,), 1, 1, **IN_PIECES)),
    "delta beside attention": (SHAPES["hybrid8b"], 4, Setting((4 * LONG,), 2, 2, **IN_PIECES)),
    "an MLP without a gate": ({**SHAPES["mamba8b"], "layers_block_type": ["mlp"] * 4}, 4, Setting((LONG // 4,), recompute="full", tile_tokens=8192)),
    "mamba-2": (SHAPES["mamba8b"], 3, Setting((LONG // 2,), recompute="full", tile_tokens=8192)),
    "mamba-2, heads in turns": (SHAPES["mamba8b"], 3, Setting((4 * LONG,), 2, 2, **IN_PIECES)),
    "mamba-2, heads in turns, narrow MLP": ({**SHAPES["mamba8b"], **NARROW}, 3, Setting((4 * LONG,), 2, 2, **IN_PIECES)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if i in (0, 5, 8) else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(CASES)]
)
def test_every_tensor_is_counted(name: str) -> None:
    shape, layers, setting = CASES[name]
    kinds = {key: shape[key][:layers] for key in ("layer_types", "layers_block_type") if key in shape}
    shape = {**shape, **kinds, "num_hidden_layers": layers}
    with ExitStack() as stack:
        like_fla(stack)
        tracked = tracked_step(shape, setting)
    timeline = Timeline()
    SimulatedStep(timeline, Sizes(sizes(shape), setting), (Keep(),) * layers).run()
    assert timeline.peak == pytest.approx(tracked.peak, rel=0.03), f"{tracked.at}; predicted at {timeline.moment}"
