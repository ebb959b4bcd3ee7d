from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ds_longft.config.model_keys import RopeConfig
from ds_longft.config.run_config import ModelConfig
from ds_longft.errors import ModelError
from ds_longft.model.load import config_remarks, load_config, load_model
from ds_longft.model.read_model import read_config
from ds_longft.model.rope import apply_rope, check_rope, restore_rope, seen_tokens, window_tokens
from ds_longft.model.rope_formulas import rope_parts
from ds_longft.model.rope_lengths import set_rope_lengths
from ds_longft.model.wrapped import make, text_class
from tests.unit.model.tiny import FAMILIES, WINDOW, tiny_config
from tests.unit.sequence.zoo import tiny

LONG = 4 * WINDOW
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def build(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()


def frequencies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The live inverse frequencies, by buffer name."""
    found = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq") and not n.endswith("original_inv_freq")}
    assert found
    return {n: b.clone() for n, b in found.items()}


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3", "abf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stretch_reaches_the_live_frequencies_and_the_saved_config(family: str, rope_type: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), random_weights=True, rope=RopeConfig(type=rope_type))
    if family == "phi3" and rope_type != "abf":
        with pytest.raises(ModelError, match=r"phi3 cannot hold rope type .* Set model\.rope\.type to abf or none"):
            load_config(model, LONG, attn_implementation="eager")
        return
    config = load_config(model, LONG, attn_implementation="eager")
    loaded = load_model(model, config, ds_engine_config=None, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert check_rope(loaded, config) < 1e-6
    plain = frequencies(build(tiny_config(family)))
    changed = {n for n, f in frequencies(loaded).items() if not torch.equal(f, plain[n])}
    whole = {n for n in plain if "sliding" not in n}
    assert changed == (set() if rope_type == "dynamic" else whole)  # dynamic changes once a document is long

    config.save_pretrained(tmp_path / "saved")
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert rope_parts(again) == rope_parts(config) != rope_parts(tiny_config(family))
    assert again.max_position_embeddings == (WINDOW if rope_type == "dynamic" else LONG)
    assert check_rope(build(again), config) < 1e-6


@pytest.mark.parametrize("parameters", [LLAMA3, LONGROPE], ids=["llama3", "longrope"])
def test_the_models_own_types_are_known(parameters: dict) -> None:
    config = tiny_config("llama", rope_parameters=dict(parameters))
    assert check_rope(build(config), config) < 1e-6


def test_yarn_and_abf_numbers_by_hand() -> None:
    yarn = tiny_config("llama")
    apply_rope(yarn, RopeConfig(type="yarn", factor=8), LONG)
    assert yarn.rope_parameters["original_max_position_embeddings"] == WINDOW
    assert yarn.max_position_embeddings == 8 * WINDOW
    even = tiny_config("llama")
    apply_rope(even, RopeConfig(type="yarn", factor=8, attention_factor=1.0), LONG)
    assert check_rope(build(even), even) < 1e-6
    assert build(even).model.rotary_emb.attention_scaling == 1.0 < build(yarn).model.rotary_emb.attention_scaling
    abf = tiny_config("llama")
    apply_rope(abf, RopeConfig(type="abf"), LONG)
    # 8 pairs over 64 tokens: the third (10000 ** (2 / 8) = 10, 1.02 turns) is the last to make a full turn
    assert abf.rope_parameters["rope_theta"] == pytest.approx(10000 * 4 ** (8 / 3))
    explicit = tiny_config("llama")
    apply_rope(explicit, RopeConfig(type="abf", theta=1e6), LONG)
    assert explicit.rope_parameters["rope_theta"] == 1e6
    assert explicit.max_position_embeddings == LONG


@pytest.mark.parametrize("base", [500.0, 10_000.0, 1e5, 5e5])
@pytest.mark.parametrize("factor", [2, 16])
def test_a_base_left_out_turns_nothing_further_than_seen(base: float, factor: int) -> None:
    """But for the last pair where all make a turn in the old window: its angle is kept, as the NTK-aware rule has it."""
    plain_config = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": base})
    [before] = frequencies(build(plain_config)).values()
    config = tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": base})
    apply_rope(config, RopeConfig(type="abf"), factor * WINDOW)
    [after] = frequencies(build(config)).values()
    partly = before * WINDOW < 2 * math.pi
    partly[-1] = True
    assert (after[partly] * factor * WINDOW <= before[partly] * WINDOW * (1 + 1e-5)).all()
    given = RopeConfig(type="abf", theta=config.rope_parameters["rope_theta"])
    assert seen_tokens(plain_config, given) == pytest.approx(factor * WINDOW, rel=1e-6)
    assert seen_tokens(plain_config, RopeConfig(type="abf", theta=base)) == WINDOW
    assert seen_tokens(plain_config, RopeConfig(type="abf")) is seen_tokens(plain_config, RopeConfig()) is None


def test_a_base_too_small_is_remarked_on(tmp_path: Path) -> None:
    """SmolLM2's numbers: the NTK-aware base for 131,072 tokens reaches 49,000; the model was lost from 82,000 on."""
    parameters = {"rope_type": "default", "rope_theta": 1e5}
    tiny_config("llama", head_dim=64, max_position_embeddings=8192, rope_parameters=parameters).save_pretrained(
        tmp_path
    )

    def remarks(theta: float | None) -> list[str]:
        rope = RopeConfig(type="abf", theta=theta)
        return config_remarks(read_config(ModelConfig(path=str(tmp_path))), rope, 131072)

    [remark] = remarks(1.75e6)
    assert "turns some dimensions further than the model has seen from some 49,0" in remark
    assert remarks(8.5e6) == remarks(None) == []


def test_llama3_numbers_by_hand() -> None:
    config = tiny_config("llama")
    apply_rope(config, RopeConfig(type="llama3"), LONG)
    [plain] = frequencies(build(tiny_config("llama"))).values()
    [stretched] = frequencies(build(config)).values()
    turns = WINDOW * plain / (2 * math.pi)
    assert torch.equal(stretched[turns >= 4], plain[turns >= 4])
    torch.testing.assert_close(stretched[turns <= 1], plain[turns <= 1] * WINDOW / LONG)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (turns >= 4).any()
    assert (stretched[between] < plain[between]).all()


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LENGTHS = [33, 20, WINDOW, 200, WINDOW + 1, 7, 32]


def rotations(model: PreTrainedModel, positions: torch.Tensor) -> list[torch.Tensor]:
    """Cos and sin, [1, s, d] each; for one layer type after the other, where they differ."""
    rotary, hidden = model.model.rotary_emb, torch.zeros(1, 1, 64)
    layers = [layer for layer in rope_parts(model.config) if layer is not None]
    outs = [rotary(hidden, positions, layer_type=layer) for layer in layers] or [rotary(hidden, positions)]
    return [part for out in outs for part in ([torch.view_as_real(out)] if isinstance(out, torch.Tensor) else out)]


def phimoe() -> PretrainedConfig:
    """Its rotary module looks at the positions itself, and scales by whether they are long."""
    scales = {"short_mscale": 1.1, "long_mscale": 1.7}
    return AutoConfig.for_model(
        "phimoe", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=WINDOW, num_local_experts=2, rope_parameters=LONGROPE | scales,
    )  # fmt: skip


def deepseek_v2() -> PretrainedConfig:
    """Its rotary module returns cos and sin as one complex number."""
    return AutoConfig.for_model(
        "deepseek_v2", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, kv_lora_rank=8, q_lora_rank=8,
        first_k_dense_replace=1, max_position_embeddings=WINDOW, rope_parameters=dict(DYNAMIC),
    )  # fmt: skip


MAKERS = {
    "dynamic": lambda: tiny_config("llama", rope_parameters=dict(DYNAMIC)),
    "longrope": lambda: tiny_config("llama", rope_parameters=dict(LONGROPE)),
    "per layer type": lambda: stretched("gemma3", "dynamic"),
    "own look at positions": phimoe,
    "complex": deepseek_v2,
}


def stretched(family: str, rope_type: str) -> PretrainedConfig:
    config = tiny_config(family)
    apply_rope(config, RopeConfig.model_validate({"type": rope_type}), LONG)
    return config


@pytest.mark.parametrize("name", MAKERS)
def test_each_document_of_a_pack_turns_as_it_does_alone(name: str) -> None:
    """transformers' own rotation, by a model that has seen nothing before; ours in one pass over all, and in shards."""
    config = MAKERS[name]()
    alone = [rotations(build(config), torch.arange(n)[None]) for n in LENGTHS]
    wanted = [torch.cat(parts, 1) for parts in zip(*alone, strict=True)]
    short, long = alone[LENGTHS.index(20)][0], alone[LENGTHS.index(200)][0]
    assert name == "per layer type" or not torch.allclose(short, long[:, :20], rtol=1e-3)
    model, before = build(config), frequencies(build(config))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    for count in (1, 2, 5):  # ranks, each with a slice
        borders = [positions.shape[1] * i // count for i in range(count + 1)]
        shards = []
        for a, b in pairwise(borders):
            starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
            here = [max(0, min(b, s + n) - max(a, s)) for s, n in zip(starts, LENGTHS, strict=True)]
            assert set_rope_lengths(model, LENGTHS, here)
            shards.append(rotations(model, positions[:, a:b]))
        for ours, theirs in zip((torch.cat(p, 1) for p in zip(*shards, strict=True)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(frequencies(model), before, rtol=0, atol=0)
    assert check_rope(model, config, LENGTHS) < 1e-6


def test_a_chunk_turns_as_its_whole_text_does() -> None:
    config = MAKERS["dynamic"]()
    whole = rotations(build(config), torch.arange(200)[None].expand(2, -1))
    model = build(config)
    set_rope_lengths(model, [200])
    chunks = [rotations(model, p[None].expand(2, -1)) for p in torch.arange(200).split(64)]
    for ours, theirs in zip((torch.cat(p, 1) for p in zip(*chunks, strict=True)), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_lengths_are_ignored_where_rope_is_static() -> None:
    model = build(tiny_config("llama"))
    before = frequencies(model)
    assert not set_rope_lengths(model, [1000])
    torch.testing.assert_close(frequencies(model), before, rtol=0, atol=0)


def test_check_catches_rounding_other_frequencies_and_other_scaling() -> None:
    config = tiny_config("llama")
    rounded = build(config).to(torch.bfloat16)  # casts buffers too
    with pytest.raises(ModelError, match=r"differ from the config's by .*bf16 rounding"):
        check_rope(rounded, config)
    stretched = tiny_config("llama")
    apply_rope(stretched, RopeConfig(type="yarn"), LONG)
    with pytest.raises(ModelError, match=r"RoPE \(yarn\): live inverse frequencies differ"):
        check_rope(build(config), stretched)
    model = build(stretched)
    model.model.rotary_emb.attention_scaling = 1.0
    with pytest.raises(ModelError, match="differ"):
        check_rope(model, stretched)
    dynamic = MAKERS["dynamic"]()
    with pytest.raises(ModelError, match=r"document of 200 tokens: .*differ"):
        check_rope(build(dynamic), dynamic, [20, 200])  # nobody called set_rope_lengths
    del model.model.rotary_emb._buffers["inv_freq"]
    with pytest.raises(ModelError, match="no inverse-frequency buffer"):
        check_rope(model, stretched)


@pytest.mark.parametrize(
    ("rope", "length", "said"),
    [
        (RopeConfig(), LONG, r"max_length_tokens is 256, the model's window is 64 tokens.*model\.rope\.type"),
        (RopeConfig(type="yarn"), WINDOW, r"lies inside the model's window of 64 tokens.*none"),
        (RopeConfig(type="linear", factor=2), LONG, r"factor 2 stretches the window of 64 to 128.*at least 4"),
    ],
)
def test_lengths_that_do_not_fit(rope: RopeConfig, length: int, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        apply_rope(tiny_config("llama"), rope, length)


def test_a_stretched_model_is_not_stretched_twice() -> None:
    with pytest.raises(ModelError, match=r"already stretched with rope type 'llama3'.*none or abf"):
        apply_rope(tiny_config("llama", rope_parameters=dict(LLAMA3)), RopeConfig(type="yarn"), LONG)
    with pytest.raises(ModelError, match=r"already stretched with rope type 'longrope'"):
        apply_rope(tiny_config("llama", rope_parameters=dict(LONGROPE)), RopeConfig(type="abf"), LONG)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_frequencies_are_made_again(family: str) -> None:
    """As zero.Init leaves them with transformers 5.17."""
    config = tiny_config(family)
    model = build(config)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("inv_freq"):
                setattr(module, name, buffer.to(torch.bfloat16))
    with pytest.raises(ModelError, match="differ from the config"):
        check_rope(model, config)
    restore_rope(model, config)
    assert check_rope(model, config) < 1e-6
    assert {b.dtype for b in frequencies(model).values()} == {torch.float32}


@pytest.mark.parametrize("window", [64, 80])
def test_yarn_as_model_cards_write_it_reaches_factor_times_the_original(window: int) -> None:
    """They leave max_position_embeddings at the original, or (Qwen3) a little above it."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500000.0}
    config = tiny_config("llama", max_position_embeddings=window, rope_parameters=scaling)
    assert window_tokens(config) == 256
    apply_rope(config, RopeConfig(), 256)
    assert config.rope_parameters["rope_theta"] == 500000.0, "nothing is laid on top of it"
    with pytest.raises(ModelError, match="window is 256 tokens"):
        apply_rope(config, RopeConfig(), 257)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma4_text", {}),  # heads of two sizes, a part of the larger turned
        ("gemma4", {}),
        ("qwen2_5_vl", {}),
        ("granite_swa", {"layer_rope_theta": [10000.0, 0, 5000.0]}),
        ("granitemoehybrid", {}),  # states what it does not use
        ("laguna", {}),  # states a kind of layer that it has not
        ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 100.0}}),
    ],
)  # fmt: skip
def test_frequencies_of_other_families(model_type: str, changes: dict[str, object]) -> None:
    config = tiny(model_type)
    config = type(config).from_dict({**config.to_dict(), **changes}) if changes else config
    assert check_rope(make(text_class(config), config), config) < 1e-6


def test_frequencies_in_another_order_are_not_taken_for_the_same() -> None:
    """ERNIE-4.5-VL keeps them in the order of its three axes; any other order, of any model, is wrong."""
    config = tiny("ernie4_5_vl_moe")
    model = make(text_class(config), config)
    check_rope(model, config)
    rotary = model.get_decoder().rotary_emb
    rotary.inv_freq = rotary.inv_freq.sort(descending=True).values
    with pytest.raises(ModelError, match="other positions"):
        check_rope(model, config)
