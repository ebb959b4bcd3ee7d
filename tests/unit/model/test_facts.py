"""Sizes, heads, windows and experts against the models that transformers builds, and operations against torch's count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig

from ds_longft.config.state_families import STATE_FAMILIES
from ds_longft.errors import ModelError
from ds_longft.model.facts import ModelFacts, layer_windows, visible_pairs
from ds_longft.model.peaks import peak_tflops
from ds_longft.model.supported import check_supported, decoder_layers
from ds_longft.model.wrapped import on_meta, whole_class
from tests.unit.model.tiny import FAMILIES, tiny_config
from tests.unit.sequence.zoo import SMALL, model_types, tiny


def facts_of(**changes: Any) -> ModelFacts:
    return replace(ModelFacts.from_config(tiny_config("llama")), **changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_part_equals_what_torch_counts(family: str) -> None:
    """Full training, one document; torch counts the whole square of attention: taken out on both sides."""
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tokens = 24
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(1, tokens + 1)[None]).logits.sum().backward()
    counted = counter.get_flop_counts()["Global"]
    linear = sum(n for op, n in counted.items() if "bmm" not in str(op))
    facts = ModelFacts.from_config(config)
    attention = 3 * 4 * facts.attention_width * sum(visible_pairs(tokens, w) for w in facts.windows)
    assert facts.step_flops([tokens], lora=False, targets=tokens) - attention == linear


def test_an_8b_model_by_hand() -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    )
    facts = ModelFacts.from_config(config)
    assert facts.body_weights == 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    length = 131072
    got = facts.step_flops([length], lora=True, targets=0)
    linear = 4 * length * facts.body_weights
    attention = 3 * 32 * 4 * 4096 * length * (length + 1) / 2
    assert got == pytest.approx(linear + attention, rel=1e-12)
    assert got == pytest.approx(17.2e15, rel=0.01)
    two_halves = facts.step_flops([length // 2] * 2, lora=True, targets=0)
    assert two_halves - linear == pytest.approx(attention / 2, rel=1e-4)
    assert facts.step_flops([length], lora=False, targets=0) - got == 2 * length * facts.body_weights
    assert facts.step_flops([length], lora=True, targets=10) - got == 4 * 10 * 4096 * 128256


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 100)])
def test_pairs_against_the_mask(length: int, window: int | None) -> None:
    rows, columns = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = (columns <= rows) & (rows - columns < (window or length))
    assert visible_pairs(length, window) == int(mask.sum())


def test_windows_by_family() -> None:
    assert layer_windows(tiny_config("llama")) == (None, None)
    assert layer_windows(tiny_config("mistral")) == (16, 16)
    assert layer_windows(tiny_config("gemma2")) == (16, None)
    assert layer_windows(tiny_config("qwen2", sliding_window=16)) == (None, None)  # use_sliding_window is off


def test_experts_count_by_their_share_of_use() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    facts = ModelFacts.from_config(config)
    attention, experts, router = 4 * 32 * 32, 2 * 3 * 32 * 48, 8 * 32
    assert facts.body_weights in {attention + experts, attention + experts + router}


def test_states_are_counted_by_hand() -> None:
    """Two gated delta layers of 4 value heads of 8 x 6, convolutions of 4 tokens over 2 * 16 + 24 channels; one softmax layer."""
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
    }
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    config = AutoConfig.for_model("qwen3_5_text", **SMALL, **sizes, layer_types=kinds)
    facts = ModelFacts.from_config(config)
    assert facts.state_products == 2 * (3 * 4 * 8 * 6 + 4 * (2 * 16 + 24))
    assert facts.windows == (None,)
    assert (
        facts.forward_flops([10], targets=0) - facts.forward_flops([5, 5], targets=0) == 4 * facts.attention_width * 25
    )


def test_latent_attention_has_one_head_size_for_queries_and_keys_and_one_for_values() -> None:
    facts = ModelFacts.from_config(tiny("youtu"))
    assert facts.head_dim == 16  # what is exchanged; the config's `head_dim` is the rotated part, 8
    assert facts.attention_width == 4 * (16 + 12) // 2


def test_layers_that_gpt_2_calls_convolutions_are_linear() -> None:
    facts = ModelFacts.from_config(tiny("gpt2"))
    assert facts.linear_io == (("c_attn", 64, 192), ("c_proj", 64, 64), ("c_fc", 64, 256), ("c_proj", 256, 64))
    assert facts.body_weights == 3 * facts.layer_weights == 3 * 12 * 64 * 64
    assert facts.inter == 256


OTHER_EXPERTS = {"beam", "doge"}  # a layer of linears each, or rows of an embedding: no stack of weights
OTHER_HEADS = {"mimo_v2_flash", "longcat_flash"}  # sliding layers have twice the keys; two attentions are one layer


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_facts_are_those_of_the_model(model_type: str) -> None:
    """Every causal model type of transformers that can be trained; types that this small a config does not make are
    left out. Of a multimodal one the facts are those of its decoder and head, as the whole model has them.
    """
    try:
        config = tiny(model_type)
        model = on_meta(whole_class(config), config)
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    try:
        check_supported(config)
        facts = ModelFacts.from_config(config)
    except ModelError:
        pytest.skip("refused by name")
    text, head = config.get_text_config(), model.get_output_embeddings()
    trained = {p for part in (model.get_decoder(), head) for p in part.parameters()}  # a tied head counts once
    assert facts.weights == sum(p.numel() for p in trained)
    assert facts.head_weights == facts.vocab * facts.hidden == head.weight.numel()
    if text.model_type not in OTHER_EXPERTS:
        assert (facts.experts > 0) == any(p.dim() == 3 and p.shape[1] > 1 for p in trained)
    state = text.model_type in STATE_FAMILIES
    assert facts.state_products == 0 or state
    assert len(facts.windows) == facts.layers or state
    if text.model_type in OTHER_HEADS or state:
        return
    for layer, one in zip(decoder_layers(model), facts.by_layer, strict=True):
        linears = {name.rsplit(".", 1)[-1]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        for name, heads in (("q_proj", one.q_heads), ("q_b_proj", one.q_heads), ("k_proj", one.kv_heads)):
            if name in linears:
                assert linears[name].out_features == heads * one.head_dim


def test_attention_costs_as_much_as_the_linears_at_its_length() -> None:
    facts = facts_of(body_weights=6_979_321_856, windows=(None,) * 32, attention_width=4096)
    for lora in (True, False):
        length = facts.equal_cost_tokens(lora=lora)
        whole = facts.step_flops([length], lora=lora, targets=0)
        linear = (4 if lora else 6) * length * facts.body_weights
        assert whole == pytest.approx(2 * linear, rel=1e-3)
    assert facts.equal_cost_tokens(lora=True) == 35_499


def test_a_forward_pass_is_the_step_without_its_backward() -> None:
    """2 of 4 operations a frozen weight, 1 of 3 parts of attention."""
    facts = facts_of(body_weights=1000, head_weights=300, windows=(None, 4), attention_width=16)
    lengths, targets = (7, 10), 5
    whole = facts.step_flops(lengths, lora=True, targets=targets)
    linear = 4 * (17 * 1000 + 5 * 300)
    assert facts.forward_flops(lengths, targets=targets) == linear / 2 + (whole - linear) / 3


def test_peaks() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA H200") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA L40S") == 362
    assert peak_tflops("NVIDIA GeForce RTX 4090") == 165
    assert peak_tflops("NVIDIA GB200") is None
    assert peak_tflops("cpu") is None
