"""Weights in fewer bits: the same numbers as the libraries' that made the formats, and as their files hold."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ds_longft.config.run_config import LoraConfig, ModelConfig
from ds_longft.errors import ModelError
from ds_longft.model.load import load_config, load_model
from ds_longft.model.load_packed import packable
from ds_longft.model.lora import add_lora, trainable_parameters
from ds_longft.model.packed import FORMATS, Packed, leave_out_of_checkpoints, pack, packed_weights, quantize, unpack
from ds_longft.model.supported import decoder_layers
from ds_longft.sequence.experts import group_experts
from ds_longft.train.install import check_packed_experts
from tests.unit.model.tiny import WINDOW, save_tiny, tiny_config

bnb = pytest.importorskip("bitsandbytes.functional")
CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def dense(form: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the weight that a layer has of them."""
    codes, scales = quantize(weight, FORMATS[form])
    layer = nn.Linear(1, 1, bias=False)
    pack(layer, "weight", Packed(FORMATS[form], tuple(weight.shape), weight.dtype, scales), codes)
    return codes, scales, layer.weight


@BOTH
def test_nf4_is_that_of_bitsandbytes_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 192).to(dtype)
    weight[3] = 0
    codes, scales, made = dense("nf4", weight)
    theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(codes, theirs.flatten())
    assert torch.equal(scales, state.absmax)
    assert torch.equal(made, bnb.dequantize_4bit(theirs, state))


def test_int8_has_the_codes_of_bitsandbytes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 192)
    codes, scales, made = dense("int8", weight)
    theirs, stats, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(codes.view(torch.int8), theirs.flatten())
    assert torch.allclose(scales * 127, stats, rtol=1e-6)
    assert torch.allclose(made, bnb.int8_vectorwise_dequant(theirs, stats), rtol=1e-6)


class Blocks:
    """What transformers' FP8 operations ask their quantizer."""

    class quantization_config:
        weight_block_size = (128, 128)
        scale_fmt = "float"


@BOTH
def test_fp8_is_that_of_transformers_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 384).to(dtype)
    codes, scales, made = dense("fp8", weight)
    theirs = Fp8Quantize(Blocks())._quantize_one("a.weight", weight)
    assert torch.equal(codes, theirs["a.weight"].view(torch.uint8).flatten())
    assert torch.equal(scales, theirs["a.weight_scale_inv"])
    truth = Fp8Dequantize(Blocks())._dequantize_one(theirs["a.weight"], theirs["a.weight_scale_inv"], dtype)
    assert torch.equal(made, truth)


def test_fp8_blocks_may_end_with_a_part_of_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(130, 300)
    made = dense("fp8", weight)[2]
    assert torch.equal(made[:128, :256], dense("fp8", weight[:128, :256])[2])
    assert torch.equal(made[128:, 256:], dense("fp8", weight[128:, 256:])[2])


@BOTH
def test_mxfp4_is_that_of_transformers_to_the_bit(dtype: torch.dtype) -> None:
    blocks, scales = torch.randint(256, (3, 8, 4, 16), dtype=torch.uint8), torch.randint(90, 160, (3, 8, 4)).byte()
    packed = Packed(FORMATS["mxfp4"], (3, 8, 128), dtype, scales, turned=True)
    assert torch.equal(packed(blocks), convert_moe_packed_tensors(blocks, scales, dtype=dtype))


@pytest.mark.parametrize(("form", "bits"), [("nf4", 4.5), ("mxfp4", 4.25), ("int8", 8), ("fp8", 8 + 32 / 128**2)])
def test_bytes_are_counted_as_they_lie(form: str, bits: float) -> None:
    assert FORMATS[form].bytes_per_weight * 8 == bits
    if form != "mxfp4":
        codes, scales = quantize(torch.randn(256, 1024), FORMATS[form])
        assert codes.numel() + 4 * scales.numel() == pytest.approx(bits / 8 * 256 * 1024, rel=0.01)
        assert scales.numel() == FORMATS[form].scales_of((256, 1024))


def test_many_weights_are_quantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 256)
    whole = {form: quantize(weight, FORMATS[form]) for form in ("nf4", "int8")}
    monkeypatch.setattr("ds_longft.model.packed.AT_A_TIME", 300)
    for form, (codes, scales) in whole.items():
        again = quantize(weight, FORMATS[form])
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)


# Loading


def load(path: Path, quantize: Any = "auto", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    model = ModelConfig(path=str(path), quantize=quantize, **more)
    config = load_config(model, WINDOW, attn_implementation="eager")
    return load_model(model, config, ds_engine_config=None, dtype=dtype, device=CPU)


def quantised(model: Any, form: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scales of every weight that is packed."""
    return {full: quantize(getattr(module, name).detach(), FORMATS[form]) for full, module, name in packable(model)}


def save_fp8(path: Path, inside: Collection[str]) -> None:
    """Rewrite a folder's files with these tensors in blocks of fp8."""

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in inside:
            return {name: tensor}
        codes, scales = quantize(tensor, FORMATS["fp8"])
        return {name: codes.view(torch.float8_e4m3fn).view(tensor.shape), f"{name}_scale_inv": scales}

    save_quantised(path, {"quant_method": "fp8", "weight_block_size": [128, 128]}, change)


def save_quantised(path: Path, how: dict[str, Any], change: Any) -> None:
    """Rewrite a folder's files: `change(name, tensor)` gives the tensors in place of one."""
    written: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        written |= {k: v.contiguous() for k, v in change(name, tensor).items()}
    save_file(written, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": how}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma3"])
@pytest.mark.parametrize("form", ["nf4", "int8", "fp8"])
def test_a_base_is_quantised_while_it_is_read(family: str, form: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path, family)
    plain, packed = load(path), load(path, form)
    truth = {full: dense(form, getattr(module, name).detach())[2] for full, module, name in packable(plain)}
    found = dict(packed_weights(packed))
    assert found.keys() == truth.keys()
    assert len(truth) == 14 if family != "phi3" else 8
    for full, weight in truth.items():
        assert torch.equal(_weight(packed, full), weight), full
    others = {n: p for n, p in plain.named_parameters() if n not in truth}
    kept = dict(packed.named_parameters())
    assert kept.keys() == others.keys()
    assert all(torch.equal(kept[n], p) for n, p in others.items())
    leave_out_of_checkpoints(packed)
    assert not any("parametrizations" in name for name in packed.state_dict()), "checkpoints would hold the base"
    assert all(not b.is_floating_point() for n, b in packed.named_buffers() if "parametrizations" in n)
    unpack(packed)
    tokens = torch.arange(1, 40)[None]
    for full, weight in truth.items():
        plain.get_parameter(full).data.copy_(weight)
    assert torch.equal(packed.eval()(tokens).logits, plain.eval()(tokens).logits)
    assert not hasattr(packed.config, "quantization_config")


def _weight(model: Any, full: str) -> torch.Tensor:
    path, _, name = full.rpartition(".")
    weight: torch.Tensor = getattr(model.get_submodule(path), name)
    return weight


@pytest.mark.parametrize("nested", [False, True])
def test_a_bitsandbytes_folder_is_trained_as_it_is(nested: bool, tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    plain, names, truth = load(path), set(), {}
    names = {full for full, _, _ in packable(plain) if "o_proj" not in full}

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in names:
            return {name: tensor}
        codes, state = bnb.quantize_4bit(tensor, quant_type="nf4", blocksize=64, compress_statistics=nested)
        # as rows of one block: on a CPU with AVX-512, bitsandbytes 0.50 puts rows that are no whole blocks together wrongly
        blocks = bnb.quantize_4bit(tensor.view(-1, 64), quant_type="nf4", blocksize=64, compress_statistics=nested)
        truth[name] = bnb.dequantize_4bit(*blocks).view_as(tensor)
        return {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}

    how = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    save_quantised(path, how | {"llm_int8_skip_modules": ["o_proj"]}, change)
    packed = load(path)
    assert dict(packed_weights(packed)).keys() == names
    assert all(torch.equal(_weight(packed, full), weight) for full, weight in truth.items())
    assert packed.config.quantization_config["quant_method"] == "bitsandbytes", "adapters are saved with it"
    made_dense = load(path, "none")
    assert all(torch.equal(made_dense.get_parameter(full), weight) for full, weight in truth.items())
    with pytest.raises(ModelError, match=r"model\.quantize is fp8, but the checkpoint is quantised already, as nf4"):
        load(path, "fp8")


def test_a_folder_of_8_bits_is_trained_as_it_is(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    names, truth = {full for full, _, _ in packable(load(path))}, {}

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if name not in names:
            return {name: tensor}
        codes, stats, _ = bnb.int8_vectorwise_quant(tensor)
        truth[name] = bnb.int8_vectorwise_dequant(codes, stats)
        return {name: codes, name.replace("weight", "SCB"): stats}

    save_quantised(path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, change)
    packed = load(path)
    assert dict(packed_weights(packed)).keys() == names
    assert all(torch.allclose(_weight(packed, full), weight, rtol=1e-6) for full, weight in truth.items())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_block_fp8_files_are_trained_as_they_are(family: str, tmp_path: Path) -> None:
    changes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32}
    if family == "deepseek_v3":  # 160 + 8 latent features: not whole blocks
        changes |= {
            "kv_lora_rank": 160,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
        }
    path = save_tiny(tmp_path, family, **changes)
    plain = load(path)
    names = {full for full, _, _ in packable(plain)}
    inside = {name for name in load_file(path / "model.safetensors") if ".mlp.experts." in name} | names

    save_fp8(path, inside)
    packed = load(path)
    assert dict(packed_weights(packed)).keys() == names
    for full, module, name in packable(plain):
        assert torch.equal(_weight(packed, full), dense("fp8", getattr(module, name).detach())[2]), full
    made_dense = load(path, "none")
    assert all(torch.equal(made_dense.get_parameter(full), _weight(packed, full)) for full in names)


def test_mxfp4_experts_are_trained_as_they_are(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "gpt_oss")
    truth = {}

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, inner, outer = tensor.shape
        blocks = torch.randint(256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(115, 125, (experts, outer, inner // 32)).byte()
        truth[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    save_quantised(path, {"quant_method": "mxfp4"}, change)
    packed = load(path)
    assert dict(packed_weights(packed)).keys() == truth.keys()
    assert all(torch.equal(_weight(packed, full), weight) for full, weight in truth.items())


def test_stacked_experts_are_quantised_with_names_and_adapters_of_a_dense_model(tmp_path: Path) -> None:
    path = save_tiny(tmp_path, "qwen3_moe", moe_intermediate_size=64)
    plain, packed = load(path), load(path, "nf4")
    assert dict(packed_weights(packed)).keys() == {full for full, _, _ in packable(plain)}
    assert not any("gate.weight" in name for name, _ in packed_weights(packed)), "routers stay"
    lora = LoraConfig(r=2, experts=True)
    ours, theirs = add_lora(packed, lora, seed=1), add_lora(plain, lora, seed=1)
    trained = [[(n, p.shape) for n, p in m.named_parameters() if p.requires_grad] for m in (ours, theirs)]
    assert trained[0] == trained[1]
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    assert trainable_parameters(ours) == trainable_parameters(theirs)
    layers = decoder_layers(ours.get_base_model())
    check_packed_experts(layers, [each for layer in layers for each in group_experts(layer, None)])
    with pytest.raises(ModelError, match="cannot run as grouped products"):
        check_packed_experts(layers, ())  # as in a model whose experts have a forward of their own
    check_packed_experts(decoder_layers(theirs.get_base_model()), ())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_oss"])
def test_random_weights_are_made_packed(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    if family == "gpt_oss":
        config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    kind = "auto" if family == "gpt_oss" else "nf4"
    model, again = (load(tmp_path, kind, torch.bfloat16, random_weights=True) for _ in range(2))
    assert all(p.device == CPU for p in [*model.parameters(), *model.buffers()])
    for full, _ in packed_weights(model):
        weight = _weight(model, full)
        assert torch.equal(weight, _weight(again, full))
        assert weight.float().std() == pytest.approx(0.2, rel=0.6)
    assert torch.isfinite(model.eval()(torch.arange(1, 40)[None]).logits).all()


@pytest.mark.parametrize(
    "how",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
)
def test_other_formats_are_refused_with_the_way_out(how: dict[str, Any], tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    save_quantised(path, how, lambda name, tensor: {name: tensor})
    with pytest.raises(ModelError, match=f"quantised by {how['quant_method']}.*what can.*unquantised.*nf4"):
        load(path)


def test_a_config_is_not_changed_by_loading(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    model = ModelConfig(path=str(path), quantize="nf4")
    config = load_config(model, WINDOW, attn_implementation="eager")
    before = copy.deepcopy(config.to_dict())
    load_model(model, config, ds_engine_config=None, dtype=torch.float32, device=CPU)
    assert config.to_dict() == before
