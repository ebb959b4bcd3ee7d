"""From `ModelConfig` to a config and a model: safetensors only, partitioned at load under ZeRO-3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ds_longft.config.model_keys import RopeConfig
from ds_longft.config.run_config import ModelConfig
from ds_longft.config.state_families import STATE_FAMILIES
from ds_longft.errors import ModelError
from ds_longft.model.load_packed import as_it_would_be, base_format, load_packed, stored_as
from ds_longft.model.new_tokens import narrowed, widen
from ds_longft.model.packed import Lies, Packed, fill_codes, pack_empty
from ds_longft.model.read_model import first_line, load_tokenizer, model_path, read_config, source_of
from ds_longft.model.rope import apply_rope, restore_rope, seen_tokens
from ds_longft.model.supported import check_class_supported, check_supported
from ds_longft.model.wrapped import is_wrapped, make, text_class


def load_config(model: ModelConfig, max_length_tokens: int, *, attn_implementation: str) -> PretrainedConfig:
    """The model's config with the RoPE change applied, `use_cache` off and the attention's name set. Loads no weights.
    Raises ModelError: nothing readable at `model.path`, an unsupported model, or a length its positions do not reach.
    """
    return prepare_config(read_config(model), model, max_length_tokens, attn_implementation=attn_implementation)


def prepare_config(
    hf_config: PretrainedConfig, model: ModelConfig, max_length_tokens: int, *, attn_implementation: str
) -> PretrainedConfig:
    """`load_config` of a config that is read already; it is changed in place."""
    check_supported(hf_config)
    base_format(hf_config, model)
    if model.add_tokens:
        text = hf_config.get_text_config()
        text.vocab_size = max(text.vocab_size, len(load_tokenizer(model)))
    apply_rope(hf_config, model.rope, max_length_tokens)
    hf_config.use_cache = hf_config.get_text_config().use_cache = False
    hf_config._attn_implementation = attn_implementation
    return hf_config


def config_remarks(hf_config: PretrainedConfig, rope: RopeConfig, max_length_tokens: int) -> list[str]:
    """What to say before training: a RoPE base too small for the length, a loss that is asked for and left out.

    `hf_config`: as it is stored.
    """
    remarks = []
    seen = seen_tokens(hf_config, rope) if rope.theta is not None else None
    if seen is not None and seen < max_length_tokens:
        remarks.append(
            f"model.rope.theta {rope.theta:g} turns some dimensions further than the model has seen from some "
            f"{seen:,} tokens on, and data.max_length_tokens is {max_length_tokens:,}: it may stay lost there; leave "
            "theta out for a base that fits"
        )
    if getattr(hf_config.get_text_config(), "output_router_logits", False):
        remarks.append(
            "the model's config asks for the load-balancing loss of its router (output_router_logits: true): it is "
            "trained only where train.router_aux_loss says how much"
        )
    if rope.type != "none" and hf_config.model_type in STATE_FAMILIES:
        remarks.append(
            f"model.rope {rope.type} stretches the softmax attention layers alone: layers that carry a state have no "
            "positions, they reach as far as they forget slowly"
        )
    return remarks


def trained_rows(model: ModelConfig) -> list[int]:
    """Ids of `model.add_tokens` where an adapter is to train their rows."""
    if not model.add_tokens or not model.train_added:
        return []
    ids = load_tokenizer(model).convert_tokens_to_ids(model.add_tokens)
    assert isinstance(ids, list)
    return sorted(ids)


def load_model(
    model: ModelConfig,
    hf_config: PretrainedConfig,
    *,
    ds_engine_config: dict[str, Any] | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> PreTrainedModel:
    """The model in `dtype`, in training mode, weights from safetensors or random.

    `ds_engine_config`: the DeepSpeed JSON with every "auto" resolved. With ZeRO stage 3, torch.distributed must be
    initialised, the weights are partitioned while they are read, and rank 0 alone reads them. Otherwise the whole model
    lies on `device`. With `model.random_weights` every rank builds the whole model there, the same on each from `seed`;
    DeepSpeed's initialize partitions it.
    Raises ModelError: no safetensors, or weights that do not fill the model.
    """
    # transformers builds every model under zero.Init while the config of an earlier ZeRO-3 model is still alive
    unset_hf_deepspeed_config()
    if model.random_weights:
        loaded = _random_model(model, hf_config, dtype, device, seed)
    else:
        loaded = _pretrained_model(model, hf_config, ds_engine_config, dtype, device)
    of_text = type(loaded.get_decoder() if is_wrapped(hf_config) else loaded)
    check_class_supported(of_text, hf_config.get_text_config().model_type)
    restore_rope(loaded, hf_config)
    return loaded.train()


def _pretrained_model(
    model: ModelConfig,
    hf_config: PretrainedConfig,
    ds_engine_config: dict[str, Any] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    path = model_path(model)
    _check_safetensors(path)
    packs = bool(base_format(hf_config, model) or stored_as(hf_config))  # each rank reads, a weight at a time
    zero3 = not packs and (ds_engine_config or {}).get("zero_optimization", {}).get("stage") == 3
    # transformers finds this object through a weak reference and then builds the model under zero.Init
    holder = HfDeepSpeedConfig(ds_engine_config) if zero3 else None
    rows = narrowed(hf_config, read_config(model) if model.add_tokens else hf_config)
    placement = {} if zero3 or device.type == "cpu" else {"device_map": {"": device}}
    try:
        how = {"dtype": dtype, "use_safetensors": True, "attn_implementation": hf_config._attn_implementation}
        how |= {"output_loading_info": True, **placement, **source_of(model)}
        if packs:
            loaded, report = load_packed(text_class(hf_config), path, model, hf_config, **how)
        else:
            loaded, report = text_class(hf_config).from_pretrained(path, config=hf_config, **how)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(f"model.path: the weights of {path!r} cannot be loaded: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"model.path: {path!r} lacks {len(missing)} of the model's weights, the first is {missing[0]}: they would "
            f"be random. Give a complete checkpoint of {hf_config.model_type}"
        )
    if rows > hf_config.get_text_config().vocab_size:
        widen(loaded, rows)
        hf_config.get_text_config().vocab_size = rows  # others ask it, and a frozen reference is made of it
    if holder is not None:
        loaded._hf_deepspeed_config = holder  # lives as long as the model: later layers are to see ZeRO-3 too
    return loaded


def _random_model(
    model: ModelConfig, hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """Built on the device in its final type: 8 billion weights take seconds there, minutes in float32 on the host."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if base_format(hf_config, model):  # dense it might not fit
            made = skeleton(model, hf_config, dtype)
            fill_random(made, [*made.modules()], device)
            made.tie_weights()
            return made
        return _made(model, hf_config, dtype, device)


def _made(model: ModelConfig, hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    trust = {"trust_remote_code": True} if model.trust_remote_code else {}
    name = hf_config._attn_implementation
    with device:
        return make(text_class(hf_config), hf_config, dtype=dtype, attn_implementation=name, **trust)


def skeleton(
    model: ModelConfig, hf_config: PretrainedConfig, dtype: torch.dtype, packed: list[Lies] | None = None
) -> PreTrainedModel:
    """The model without memory, in training mode: modules, and the shapes of their tensors.

    `packed`: how its weights lie, where files were read; left out, as `model.quantize` says.
    """
    unset_hf_deepspeed_config()
    made = _made(model, hf_config, dtype, torch.device("meta"))
    form = base_format(hf_config, model)
    pack_empty(made, as_it_would_be(made, form) if packed is None and form else packed or [], dtype)
    return made.train()


@torch.no_grad()
def fill_random(model: PreTrainedModel, modules: Sequence[nn.Module], device: torch.device) -> None:
    """Give these modules of a `skeleton` memory and random weights; RoPE its frequencies. Draws as the seed stands."""
    deviation = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)
    for module in modules:
        if isinstance(module, ParametrizationList):
            fill_codes(module, device, deviation)
        if isinstance(module, ParametrizationList | Packed):
            continue
        module.to_empty(device=device, recurse=False)
        if is_parametrized(module):
            for bias in module.parameters(recurse=False):
                bias.zero_()
            continue
        model._init_weights(module)
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            for name, tensor in [*fresh._buffers.items(), *vars(fresh).items()]:
                if isinstance(tensor, torch.Tensor):
                    setattr(module, name, tensor.to(device))


def _check_safetensors(path: str) -> None:
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return  # a hub id is judged by from_pretrained
    found = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf"})
    raise ModelError(
        f"model.path: {path!r} holds no .safetensors file"
        + (f", only {', '.join(found[:3])}. Pickled weights can run code and are never read" if found else "")
        + ": convert the model with save_pretrained, or set model.random_weights for a rehearsal without weights"
    )
