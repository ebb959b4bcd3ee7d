"""The inverse frequencies each RoPE type stands for, in float64, written from the formulas and not from transformers.

A second opinion for `rope.check_rope`: it shares no code with the library that builds the model.
"""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig

from ds_longft.errors import ModelError


def rope_parts(hf_config: PretrainedConfig) -> dict[str | None, dict]:
    """`config.rope_parameters` by layer type: `{None: ...}` where all layers share one, `{}` for models without RoPE.

    The inner dicts are the config's own: changing them changes the config.
    """
    text = hf_config.get_text_config()
    if text.model_type == "granitemoehybrid" and text.position_embedding_type != "rope":
        return {}  # stated, and not used
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if nested:
        return dict(nested)
    return {None: parameters} if parameters.get("rope_theta") else {}


def config_head_dim(hf_config: PretrainedConfig) -> int:
    """Size of a head as the config of a layer has it. Of latent attention (DeepSeek) it is the rotated part alone."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def layer_configs(hf_config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config of each layer; of most models the same one (Gemma 4 has heads of two sizes)."""
    text = hf_config.get_text_config()
    return list(getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers)


def config_of_type(hf_config: PretrainedConfig, layer_type: str | None) -> PretrainedConfig:
    """The config of the first layer of a type, of the whole model where layers have none."""
    text = hf_config.get_text_config()
    types = list(getattr(text, "layer_types", None) or ())
    return layer_configs(text)[types.index(layer_type)] if layer_type in types else text


def rotary_dim(hf_config: PretrainedConfig, parameters: dict) -> int:
    """How many of a head's dimensions are rotated."""
    return int(config_head_dim(hf_config) * parameters.get("partial_rotary_factor", 1.0))


def expected_frequencies(
    hf_config: PretrainedConfig, layer_type: str | None, document_tokens: int | None = None
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [d / 2] float64 and the factor on cos and sin, for one layer type.

    `document_tokens`: of the document, for `dynamic` and `longrope` alone; None is the state after loading.
    """
    parameters, of_layer = rope_parts(hf_config)[layer_type], config_of_type(hf_config, layer_type)
    dim = rotary_dim(of_layer, parameters)
    theta = float(parameters["rope_theta"])
    plain = _plain(theta, dim)
    window = hf_config.get_text_config().max_position_embeddings
    match parameters["rope_type"]:
        case "default" if "ernie4_5_vl" in hf_config.get_text_config().model_type:  # in the order of its axes
            axes = parameters["mrope_section"]
            spatial, in_time = plain.split([axes[0] + axes[1], axes[2]])
            return torch.cat([spatial[0::2], spatial[1::2], in_time]), 1.0
        case "default":
            return plain, 1.0
        case "proportional":  # turned as if all of the head were, the rest not at all (Gemma 4)
            whole = config_head_dim(of_layer)
            still = torch.zeros(whole // 2 - dim // 2, dtype=torch.float64)
            turned = torch.cat([_plain(theta, whole)[: dim // 2], still])
            return turned / parameters.get("factor", 1.0), 1.0
        case "dynamic" if parameters.get("alpha"):  # Hunyuan: a base of its own, whatever the length
            return _plain(theta * parameters["alpha"] ** (dim / (dim - 2)), dim), 1.0
        case "linear":
            return plain / parameters["factor"], 1.0
        case "dynamic":
            factor, length = parameters["factor"], max(document_tokens or window, window)
            return _plain(theta * (factor * length / window - (factor - 1)) ** (dim / (dim - 2)), dim), 1.0
        case "yarn":
            return _yarn(plain, theta, dim, parameters, window)
        case "longrope":
            return _longrope(plain, parameters, window, document_tokens)
        case "llama3":
            return _llama3(plain, parameters), 1.0
        case other:
            raise ModelError(
                f"rope type {other!r} of {hf_config.model_type} is not known here, so its live frequencies cannot be "
                f"checked; known: default, linear, dynamic, yarn, longrope, llama3, proportional"
            )


def _plain(theta: float, dim: int) -> torch.Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _yarn(plain: torch.Tensor, theta: float, dim: int, parameters: dict, window: int) -> tuple[torch.Tensor, float]:
    """YaRN: high frequencies stay, low ones are interpolated, a linear ramp between (Peng et al. 2023, section 3.2)."""
    original = parameters["original_max_position_embeddings"]
    factor = parameters["factor"] or window / original

    def turns_to_dim(turns: float) -> float:
        """The (fractional) dimension pair that makes N turns over the original window."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = turns_to_dim(parameters.get("beta_fast") or 32)
    high = turns_to_dim(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    frequencies = plain / factor * interpolated + plain * (1 - interpolated)

    scaling = parameters.get("attention_factor")
    if scaling is None:
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and mscale_all:
            scaling = _mscale(factor, mscale) / _mscale(factor, mscale_all)
        else:
            scaling = _mscale(factor, 1.0)
    return frequencies, float(scaling)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(
    plain: torch.Tensor, parameters: dict, window: int, document_tokens: int | None
) -> tuple[torch.Tensor, float]:
    """LongRoPE: one divisor per frequency, another set once a document is longer than the original window."""
    original = parameters["original_max_position_embeddings"]
    is_long = document_tokens is not None and document_tokens > original
    divisors = torch.tensor(parameters["long_factor" if is_long else "short_factor"], dtype=torch.float64)
    factor = parameters.get("factor") or window / original
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return plain / divisors, float(scaling)


def _llama3(plain: torch.Tensor, parameters: dict) -> torch.Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones stay, a smooth blend between."""
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / factor)
