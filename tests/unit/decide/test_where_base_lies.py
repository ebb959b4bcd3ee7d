"""Where frozen weights lie when the run leaves it open: the first place beside which the longest pack fits, and what that
costs in memory and time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import AutoConfig

from ds_longft.config.ds_json import merge_ds_config
from ds_longft.config.run_config import RunConfig
from ds_longft.decide.decisions import Run
from ds_longft.decide.memory import host_bytes, predict
from ds_longft.decide.search import Question, fastest
from ds_longft.decide.setting import GIB, Gpu, Setting
from ds_longft.decide.time import predict_time
from ds_longft.decide.where_base_lies import with_room
from ds_longft.errors import ConfigError
from ds_longft.model.facts import ModelFacts
from tests.unit.decide.shapes import LLAMA_8B

HF = AutoConfig.for_model(**LLAMA_8B)
FACTS = ModelFacts.from_config(HF)
LAYERS_GIB = 2 * FACTS.layers_weights / GIB  # 13.0


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"model": {"base": "host"}, "lora": None}, ["model.base is host", "lora is null"]),
        ({"model": {"base": "resident"}, "lora": None}, ["model.base is resident", "lora is null"]),
        ({"model": {"base": "sharded"}, "train": {"recompute": "none"}}, ["model.base is sharded", "train.recompute"]),
        ({"model": {"base": "host"}, "lora": {"dora": True}}, ["model.base is host", "lora.dora"]),
        ({"model": {"base": "engine"}, "lora": None}, []),
        ({"model": {"base": "resident"}, "train": {"recompute": "none"}, "lora": {"dora": True}}, []),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys: dict[str, Any], named: list[str]) -> None:
    if not named:
        RunConfig.model_validate(keys)
        return
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate(keys)
    assert all(name in str(refused.value) for name in named)


def test_the_json_and_the_key_do_not_both_say_where_weights_lie() -> None:
    zero = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    config = RunConfig.model_validate({"model": {"base": "host"}})
    with pytest.raises(ConfigError, match=r"offload_param is set, and model\.base is host"):
        merge_ds_config(zero, config, world=1, device="cuda", hidden_size=64)


def run(gpu: str, tokens: int, world: int, memory_gib: float, **train: Any) -> Run:
    keys = {"data": {"max_length_tokens": tokens}, "sp": world, "train": train}
    config = RunConfig.model_validate(keys)
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"}}
    engine = merge_ds_config(zero, config, world=world, device="cuda", hidden_size=4096).engine
    card = replace(Gpu.load(gpu), memory_gib=memory_gib)
    return Run(config, engine, HF, FACTS, world, world, world, card, True, "", True)


@pytest.mark.parametrize(
    ("gpu", "tokens", "world", "memory_gib", "node_gib", "base"),
    [
        ("h200", 32768, 1, 139.8, 1000, "engine"),  # fits
        ("h200", 65536, 1, 24.0, 1000, "host"),
        ("h200", 65536, 1, 24.0, 12, "engine"),  # 13 GiB of weights are not put into 12
        ("h200", 98304, 2, 24.0, 1000, "sharded"),
        ("rtx4090", 98304, 2, 24.0, 1000, "host"),  # faster than through the host and to the other card
        ("h200", 1 << 24, 2, 24.0, 1000, "engine"),  # fits nowhere
    ],
)
def test_the_first_place_that_leaves_room(
    gpu: str, tokens: int, world: int, memory_gib: float, node_gib: float, base: str
) -> None:
    asked = run(gpu, tokens, world, memory_gib, recompute="auto")
    found = with_room(asked, node_gib)
    assert found.base == base
    assert found.stage == (3 if base == "engine" else 2)
    assert bool(found.why) == (base != "engine")
    assert asked.stage == 3  # the run that was asked about is as it was


def test_bytes_lie_where_they_are_said_to() -> None:
    gpu, x = Gpu.load("h200"), Setting((65536,), sp=2, world=2, stage=2, recompute="full")
    weights = {
        base: predict(FACTS, replace(x, base=base), gpu).parts["weights"] / GIB
        for base in ("engine", "sharded", "host")
    }
    slots = 2 * 2 * FACTS.largest_layer / GIB
    assert weights["engine"] - weights["host"] == pytest.approx(LAYERS_GIB - slots)
    assert weights["sharded"] - weights["host"] == pytest.approx(LAYERS_GIB / 2)
    assert host_bytes(FACTS, replace(x, base="host")) / GIB == pytest.approx(LAYERS_GIB / 2)  # two ranks, one copy
    assert host_bytes(FACTS, replace(x, base="sharded")) == 0


def test_streams_cost_nothing_behind_long_samples_and_something_behind_short_ones() -> None:
    gpu = Gpu.load("rtx4090")

    def step_s(tokens: int, base: Any) -> float:
        x = Setting((tokens,), stage=2, base=base, kernel="flash-attn-2", recompute="full")
        return predict_time(FACTS, x, gpu, predict(FACTS, x, gpu).keep).total_s

    assert step_s(32768, "host") == step_s(32768, "engine")
    once_s = LAYERS_GIB * GIB / (gpu.host_gb_s * 1e9)
    assert 0.5 * once_s < step_s(512, "host") - step_s(512, "engine") < 2 * once_s


def test_a_plan_streams_where_nothing_else_fits() -> None:
    question = Question(FACTS, Gpu.load("4090"), 1, 96.0)
    there, away = fastest(question, 2048), fastest(question, 131072)
    assert there is not None
    assert away is not None
    assert (there.setting.base, away.setting.base) == ("engine", "host")
    assert away.setting.host_gib == pytest.approx(96 - LAYERS_GIB)
    assert away.memory.host / GIB <= 96
