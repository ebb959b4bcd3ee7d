"""A base loaded in fewer bits: quantised while it is read, or as its files hold it already.

transformers reads the files, finds each tensor's place and hands it over (its `HfQuantizer`); here it is packed at
once, so that one dense weight is on the device at a time, of stacked experts one stack.

What is packed: the linear layers of the decoder layers and stacked experts. Embeddings, head, norms and routers stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ds_longft.config.quantized import format_name
from ds_longft.config.run_config import ModelConfig
from ds_longft.errors import ModelError
from ds_longft.model.packed import FORMATS, Format, Lies, Packed, pack, packed_weights, quantize, unpack
from ds_longft.model.supported import decoder_layers

METHOD = "ds_longft"


def stored_as(hf_config: PretrainedConfig) -> dict[str, Any]:
    """What the checkpoint's config says of how it is quantised; {} of one that is not."""
    found = getattr(hf_config, "quantization_config", None)
    found = found or getattr(hf_config.get_text_config(), "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


def base_format(hf_config: PretrainedConfig, model: ModelConfig) -> Format | None:
    """In which format the base's weights lie while it is trained; None: dense.
    Raises ModelError: files in a format that cannot be read, or in another one than `model.quantize` asks for.
    """
    name, problem = format_name(stored_as(hf_config), model.quantize)
    if problem:
        raise ModelError(problem)
    return FORMATS.get(name)


def packable(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name of each weight that is packed, its module, and its name there."""
    names = {module: name for name, module in model.named_modules()}
    for layer in decoder_layers(model):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                if not {"router", "gate", "classifier"} & set(names[module].split(".")):
                    yield f"{names[module]}.weight", module, "weight"
            elif not isinstance(module, nn.Conv1d):
                for name, p in module.named_parameters(recurse=False):
                    if p.dim() == 3:
                        yield f"{names[module]}.{name}", module, name


@torch.no_grad()
def round_as_packed(model: PreTrainedModel, form: Format) -> None:
    """Give a dense model the weights that it would have packed in this format."""
    for _, module, name in packable(model):
        weight = module.get_parameter(name)
        if form.fits(tuple(weight.shape)):
            codes, scales = quantize(weight, form)
            weight.copy_(Packed(form, tuple(weight.shape), weight.dtype, scales)(codes))


def load_packed(cls: Any, path: str, model: ModelConfig, hf_config: PretrainedConfig, **kwargs: Any) -> Any:
    """As `cls.from_pretrained` with `output_loading_info`; packed, or (`model.quantize: none`) made dense again."""
    own, stored = base_format(hf_config, model), stored_as(hf_config)
    form = own or base_format(hf_config, model.model_copy(update={"quantize": "auto"}))
    assert form is not None
    plain = type(hf_config).from_dict({k: v for k, v in hf_config.to_dict().items() if k != "quantization_config"})
    plain._attn_implementation = hf_config._attn_implementation
    loaded, report = cls.from_pretrained(path, config=plain, quantization_config=_How(form, stored), **kwargs)
    if converters := getattr(loaded, "_weight_conversions", None):  # a merged model is saved by what is left of them
        reads = [c for c in converters if any(isinstance(op, _Read) for op in getattr(c, "operations", ()))]
        loaded._weight_conversions = [c for c in converters if c not in reads] or None
    if own is None:
        unpack(loaded)
    elif stored:
        loaded.config.quantization_config = stored  # it is saved with adapters: readers of the base need it
    return loaded, report


def as_it_would_be(model: PreTrainedModel, form: Format) -> list[Lies]:
    """How the weights of a model without files are packed."""
    turned, found = form.name == "mxfp4", list[Lies]()
    for full, module, name in packable(model):
        shape = tuple(module.get_parameter(name).shape)
        lies = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        if form.fits(lies) and not (turned and len(shape) < 3):
            found.append((full, form.name, lies, turned))
    return found


class _How(QuantizationConfigMixin):
    """What transformers hands through to the quantizer."""

    quant_method: Any = METHOD

    def __init__(self, form: Format, stored: dict[str, Any]) -> None:
        self.form, self.stored = form, stored

    def to_dict(self) -> dict[str, Any]:
        """For transformers' log."""
        return {"quant_method": METHOD, "format": self.form.name}


@register_quantizer(METHOD)
class _Packer(HfQuantizer):
    """Packs what transformers reads."""

    quantization_config: Any

    def __init__(self, how: _How, **kwargs: Any) -> None:
        super().__init__(how, **kwargs)
        self.form, self.pre_quantized = how.form, bool(how.stored)
        self.chosen: set[str] = set()  # full names of weights: transformers copies what it is given
        self.dtype = torch.float32

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """Weight -> the tensors that hold it in the files."""
        if self.form.name == "mxfp4":
            return {name: [f"{name}_blocks", f"{name}_scales"] for name in ("gate_up_proj", "down_proj")}
        of_nf4 = ("nested_absmax", "nested_quant_map", "quant_map", "absmax", "quant_state.bitsandbytes__nf4")
        beside = {
            "nf4": [f"weight.{name}" for name in of_nf4],
            "int8": ["SCB", "weight_format"],
            "fp8": ["weight_scale_inv"],
        }
        return {"weight": ["weight", *beside[self.form.name]]}

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        self.dtype = dtype or torch.float32
        found = list(packable(model))
        if not self.pre_quantized:
            found = [each for each in found if self.form.fits(tuple(getattr(*each[1:]).shape))]
        self.chosen = {full for full, _, _ in found}
        if self.pre_quantized and self.form.name == "fp8":  # experts lie one by one: transformers stacks both alike
            for module, name in self._stacks(model):
                shape = getattr(module, name).shape
                blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
                parts = ((name, shape, torch.float8_e4m3fn), (f"{name}_scale_inv", blocks, torch.float32))
                for each, dims, kind in parts:
                    empty = torch.empty(dims, dtype=kind, device="meta")
                    module.register_parameter(each, nn.Parameter(empty, requires_grad=False))

    def _stacks(self, model: Any) -> list[tuple[nn.Module, str]]:
        return [(module, name) for _, module, name in packable(model) if name != "weight"]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it is packed while it is read."""
        return not self.pre_quantized and param_name in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        """Of dense weights."""
        return _Pack(self)

    def get_load_operations(self) -> dict[str, Any]:
        """Of files that are quantised."""
        return {"deserialize": _Read}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Of newer transformers its own, from the two above; 5.17 asks for all of it here.

        Patterns end with `$`: there the first that a tensor's name begins with takes it.
        """
        if hasattr(HfQuantizer, "get_load_operations"):
            return list(super().update_weight_conversions(weight_conversions, *model))
        if not self.pre_quantized:
            return weight_conversions
        converters = []
        for one in weight_conversions:
            of_weights = isinstance(one, WeightConverter) and all(s.endswith(".weight") for s in one.source_patterns)
            if self.form.name != "fp8" or not of_weights:
                converters.append(one)
                continue
            for suffix in ("", "_scale_inv"):  # experts that lie one by one: codes and scales are stacked alike
                sources = [f"{source}{suffix}$" for source in one.source_patterns]
                copy = WeightConverter(sources, [f"{t}{suffix}" for t in one.target_patterns], list(one.operations))
                copy.scope_prefix, copy.base_model_prefix = one.scope_prefix, one.base_model_prefix
                converters.append(copy)
        of_files = [
            WeightConverter([f"{name}$" for name in names], weight, [_Read(self)])
            for weight, names in self.serialized_names.items()
        ]
        return [*converters, *of_files]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized and self.form.name == "fp8":
            for module, name in self._stacks(model):
                if name.endswith("_scale_inv"):
                    continue
                codes, scales = (module._parameters[each] for each in (name, f"{name}_scale_inv"))
                assert codes is not None and scales is not None
                del module._parameters[f"{name}_scale_inv"]
                packed = Packed(self.form, tuple(codes.shape), self.dtype, scales.detach())
                pack(module, name, packed, _fp8_codes(codes.detach()))
        self.remove_quantization_config(model)
        if not next(packed_weights(model), None):
            raise ModelError(f"no layer of this {model.config.model_type} is quantised as {self.form.name}")

    def is_serializable(self) -> bool:
        """Never written by transformers."""
        return False

    is_trainable: Any = True  # adapters are


class _Pack(ConversionOps):
    """A dense weight that was read -> codes and scales in its layer."""

    def __init__(self, hf_quantizer: _Packer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: Any, *, model: Any = None, missing_keys: Any = None, **kwargs: Any) -> dict[str, Any]:
        """See `ConversionOps.convert`: nothing is left for transformers to place."""
        by, rest = self.hf_quantizer, {}
        for full, value in input_dict.items():
            if full not in by.chosen:
                rest[full] = value
                continue
            weight = value[0] if isinstance(value, list) else value
            codes, scales = quantize(weight, by.form)
            path, _, name = full.rpartition(".")
            packed = Packed(by.form, tuple(weight.shape), by.dtype, scales)
            pack(model.get_submodule(path), name, packed, codes)
            missing_keys.discard(full)
        return rest


class _Read(ConversionOps):
    """The tensors that hold a weight in the files -> codes and scales in its layer."""

    def __init__(self, hf_quantizer: _Packer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: Any, *, full_layer_name: str, model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """See `ConversionOps.convert`. A weight that lies alone is not quantised."""
        by = self.hf_quantizer
        parts = {key.rstrip("$"): value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if len(parts) == 1:
            return {full_layer_name: parts["weight"].to(by.dtype)}
        path, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(path)
        codes, scales, shape, turned = _parts(by.form, parts, name, tuple(getattr(module, name).shape))
        pack(module, name, Packed(by.form, shape, by.dtype, scales, turned=turned), codes)
        missing_keys.discard(full_layer_name)
        return {}


def _parts(
    form: Format, parts: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, tuple[int, ...], bool]:
    """Codes, scales, the shape that codes have, and whether the layer has it the other way round."""
    if form.name == "mxfp4":
        blocks, scales = parts[f"{name}_blocks"], parts[f"{name}_scales"]  # [E, O, G, 16], [E, O, G]
        return blocks, scales, (*blocks.shape[:2], blocks.shape[2] * 32), True
    codes = parts["weight"]
    if form.name == "fp8":
        return _fp8_codes(codes), parts["weight_scale_inv"], shape, False
    if form.name == "int8":
        return codes.view(torch.uint8), parts["SCB"] / 127, shape, False
    state = json.loads(bytes(parts["weight.quant_state.bitsandbytes__nf4"].tolist()))
    scales = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:  # scales quantised once more, 256 of them a block
        wide = parts["weight.nested_quant_map"].float()[scales.int()]
        of_block = parts["weight.nested_absmax"].float().repeat_interleave(state["nested_blocksize"])[: len(wide)]
        scales = wide * of_block + state["nested_offset"]
    if state["blocksize"] != form.columns:
        raise ModelError(f"a checkpoint of nf4 in blocks of {state['blocksize']} weights; blocks of 64 can be read")
    return codes, scales, shape, False


def _fp8_codes(codes: Tensor) -> Tensor:
    """As uint8; transformers 5.17 has made them wider, which changes no value."""
    return codes.to(torch.float8_e4m3fn).view(torch.uint8)
