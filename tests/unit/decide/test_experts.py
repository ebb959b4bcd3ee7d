"""Mixtures of experts: memory and operations of a step against the code itself, counted under fake tensors."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper

from ds_longft.config.run_config import LoraConfig
from ds_longft.decide.setting import Gpu, Setting
from ds_longft.decide.simulated_step import SimulatedStep
from ds_longft.decide.tensors import Keep, Sizes
from ds_longft.decide.time import predict_time
from ds_longft.decide.timeline import Timeline
from ds_longft.decide.work import expert_elements, multiplied_weights
from ds_longft.model.lora import add_lora
from tests.distributed.models import tiny_model
from tests.unit.decide.shapes import GPT_OSS, MIXTRAL, QWEN_30B, sizes
from tests.unit.decide.tracked import tracked_step
from tests.unit.model.tiny import tiny_config

LONG = (131072,)
CASES = {
    # name: shape, setting
    "Qwen3-30B-A3B": (QWEN_30B, Setting(LONG, recompute="full", lora_experts=True)),
    "without liger": (QWEN_30B, Setting(LONG, recompute="full", fused=False)),
    "in tiles": (QWEN_30B, Setting(LONG, recompute="keep_attention", tile_tokens=8192, lora_experts=True)),
    "two ranks": (QWEN_30B, Setting(LONG, 2, 2, recompute="full", lora_experts=True)),
    "short, nothing again": (QWEN_30B, Setting((16384,), recompute="none", lora_experts=True)),
    "wide experts": (MIXTRAL, Setting((16384,), recompute="full", lora_experts=True)),
    "every weight": (MIXTRAL, Setting((65536,), 1, 1, lora_r=None, recompute="full")),
    "transposed, with biases": (GPT_OSS, Setting(LONG, recompute="full", fused=False, lora_experts=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_and_product_of_a_step_is_counted(name: str) -> None:
    shape, setting = CASES[name]
    shape = {**shape, "num_hidden_layers": 2}
    tracked, model = tracked_step(shape, setting), sizes(shape)
    timeline = Timeline()
    SimulatedStep(timeline, Sizes(model, setting), (Keep(),) * 2).run()
    assert timeline.peak == pytest.approx(tracked.peak, rel=0.05), f"{tracked.at}; predicted at {timeline.moment}"
    weights = multiplied_weights(model, setting, (Keep(),) * 2)
    products = 2 * setting.local_tokens * (weights + expert_elements(model, setting))
    if setting.lora_r is None:  # routers apart
        assert tracked.operations == pytest.approx(products, rel=0.01)
    else:  # predicted with the adapters' products as wide as they cost
        assert 0.75 < tracked.operations / products < 1.02


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("experts", [False, True])
def test_adapters_are_counted(family: str, experts: bool) -> None:
    config = tiny_config(family)

    model = add_lora(tiny_model(config, attn="eager", dtype=torch.float32), LoraConfig(r=4, experts=experts), seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = sizes({**config.to_dict()})
    assert facts.trained_weights(4, experts) == trained
    assert any(isinstance(m, ParamWrapper) for m in model.modules()) == experts


def test_experts_take_time() -> None:
    """A token passes 8 of 128 experts: nine tenths of the linear weights that it meets."""
    model, setting, gpu = sizes(QWEN_30B), Setting((4096,), lora_experts=True, recompute="full"), Gpu.load("h200")
    parts = predict_time(model, setting, gpu, (Keep(),) * 48).parts
    assert 1 < parts["experts"] / parts["matrix products"] < 4
    assert model.body_weights / model.weights == pytest.approx(0.09, abs=0.02)
