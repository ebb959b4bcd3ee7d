"""Where frozen weights lie when the run leaves it open: the first place beside which the longest pack fits, and what that
costs in memory and time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig

from ds_longft.config.ds_json import merge_ds_config
from ds_longft.config.run_config import ModelConfig, RunConfig
from ds_longft.decide.decisions import Run
from ds_longft.decide.memory import host_bytes, predict
from ds_longft.decide.search import Question, fastest
from ds_longft.decide.setting import GIB, Gpu, Setting
from ds_longft.decide.tensors import bytes_of_layers
from ds_longft.decide.time import predict_time
from ds_longft.decide.where_base_lies import settle_base, what_is_lost, with_room
from ds_longft.errors import ConfigError
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load import skeleton
from ds_longft.model.load_packed import base_format
from ds_longft.model.supported import decoder_layers
from ds_longft.sequence.frozen import parts_of, size_of
from tests.unit.decide.shapes import LLAMA_8B, QWEN_7B, QWEN_30B, shape

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


@pytest.mark.parametrize(
    ("stage", "base", "lost"),
    [(3, "host", True), (3, "engine", False), (3, "auto", True), (2, "auto", True)],
)
def test_keys_of_the_json_that_nothing_reads_are_said(stage: int, base: str, lost: bool) -> None:
    zero = {"stage": stage, "stage3_max_live_parameters": 5, "zero_hpz_partition_size": 1}
    zero |= {"stage3_param_persistence_threshold": "auto"} if stage == 3 else {}
    config = RunConfig.model_validate({"model": {"base": base}, "data": {"max_length_tokens": 4096}})
    settings = merge_ds_config({"zero_optimization": zero}, config, world=1, device="cuda", hidden_size=4096)
    chosen, why = settle_base(settings, config, FACTS, memory_gib=139.8)
    asked = replace(run("h200", 4096, 1, 139.8), engine_config=settings.engine, base=chosen, why=why)
    said = what_is_lost(asked, settings)
    named = "stage3_max_live_parameters 5, zero_hpz_partition_size 1"
    assert (named in said, "persistence" in said) == (lost, False)
    assert (f"model.base {chosen}" in said) == (lost and stage == 3)


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


GPT_OSS = {**shape("gpt_oss"), "quantization_config": {"quant_method": "mxfp4"}}
PACKED = {
    "nf4": (LLAMA_8B, "nf4"),
    "int8": (LLAMA_8B, "int8"),
    "fp8, biases": (QWEN_7B, "fp8"),
    "nf4, experts": (QWEN_30B, "nf4"),
    "mxfp4, experts alone": (GPT_OSS, "auto"),
}


@pytest.mark.parametrize("name", PACKED)
def test_bytes_of_a_quantised_base_are_those_of_its_packed_tensors(name: str) -> None:
    of, asked = PACKED[name]
    hf_config = AutoConfig.for_model(**{**of, "num_hidden_layers": 2})
    hf_config._attn_implementation = "eager"
    model = ModelConfig.model_validate({"quantize": asked, "random_weights": True})
    form = base_format(hf_config, model)
    assert form is not None
    lies = sum(size_of(parts_of(layer)) for layer in decoder_layers(skeleton(model, hf_config, torch.bfloat16)))
    counted = bytes_of_layers(ModelFacts.from_config(hf_config), Setting((1,), quantize=form.name))
    assert counted == pytest.approx(lies, rel=0.002)


def test_streams_cost_nothing_behind_long_samples_and_something_behind_short_ones() -> None:
    gpu = Gpu.load("rtx4090")

    def step_s(tokens: int, base: Any) -> float:
        x = Setting((tokens,), stage=2, base=base, kernel="flash-attn-2", recompute="full")
        return predict_time(FACTS, x, gpu, predict(FACTS, x, gpu).keep).total_s

    assert step_s(32768, "host") == step_s(32768, "engine")
    once_s = LAYERS_GIB * GIB / (gpu.host_gb_s * 1e9)
    assert 0.5 * once_s < step_s(512, "host") - step_s(512, "engine") < 2 * once_s


def test_smaller_tiles_are_taken_where_nothing_else_fits() -> None:
    """A Llama-8B in nf4 on a card of 24 GB with 96 GiB of host memory: 294,912 tokens."""
    question = Question(FACTS, Gpu.load("4090"), 1, 96.0, quantize="nf4")
    shorter, longer = fastest(question, 262144), fastest(question, 294912)
    assert shorter is not None
    assert longer is not None
    assert (shorter.setting.tile_tokens, longer.setting.tile_tokens) == (8192, 4096)


def test_a_plan_streams_where_nothing_else_fits() -> None:
    question = Question(FACTS, Gpu.load("4090"), 1, 96.0)
    there, away = fastest(question, 2048), fastest(question, 131072)
    assert there is not None
    assert away is not None
    assert (there.setting.base, away.setting.base) == ("engine", "host")
    assert away.setting.host_gib == pytest.approx(96 - LAYERS_GIB)
    assert away.memory.host / GIB <= 96
