"""Which way is chosen: the fastest that fits, or what comes nearest to fitting."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from ds_longft.decide.memory import predict
from ds_longft.decide.search import LEAST_TILE_TOKENS, fastest_of, last_resorts, savers
from ds_longft.decide.setting import Gpu, Setting
from ds_longft.model.facts import ModelFacts
from tests.unit.decide.shapes import LLAMA_8B

MODEL = ModelFacts.from_config(AutoConfig.for_model(**{**LLAMA_8B, "num_hidden_layers": 8}))
ASKED = Setting(
    lengths=(294912,), stage=2, base="host", quantize="nf4", recompute="auto", kernel="flash-attn-4", host_gib=90.0
)  # fmt: skip


@pytest.mark.parametrize("memory_gib", [8.0, 20.0])
def test_where_nothing_fits_the_way_that_needs_least_is_chosen(memory_gib: float) -> None:
    """Not the last one that was looked at: a prediction can be a little too high, and the run may fit after all."""
    gpu = replace(Gpu.load("h200"), memory_gib=memory_gib)
    ways = [*savers(ASKED, MODEL), *last_resorts(ASKED, MODEL)]
    assert not any(predict(MODEL, way, gpu).fits(gpu) for way in ways)
    chosen = fastest_of(ways, MODEL, gpu)
    assert predict(MODEL, chosen, gpu).peak == min(predict(MODEL, way, gpu).peak for way in ways)
    assert predict(MODEL, ways[-1], gpu).peak > 1.2 * predict(MODEL, chosen, gpu).peak
    assert (chosen.kv_heads, chosen.tile_tokens) == (1, LEAST_TILE_TOKENS)
