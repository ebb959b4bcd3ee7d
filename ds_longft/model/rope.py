"""Rotary position embedding: stretched in the config before the model is built, and checked on the live frequencies.

Two facts make this more than a config edit:
- A stretch that arrives too late, is dropped on the way, or is rounded to bf16 trains without any error. So the
  inverse frequencies are computed again in float64 (`rope_formulas`) and compared with the buffers the model uses.
- `dynamic` and `longrope` choose their frequencies by the length of a text: see `rope_lengths`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig

from ds_longft.config.model_keys import RopeConfig
from ds_longft.config.window import reached_tokens, stretch_factor, window_problem
from ds_longft.errors import ModelError
from ds_longft.model.rope_formulas import config_of_type, expected_frequencies, rope_parts, rotary_dim
from ds_longft.model.rope_lengths import LENGTH_DEPENDENT, ByDocument, length_dependent_layers, rotary_modules

# Frequencies of at most one turn over the old window are interpolated, those of at least four stay (as in Llama 3.1).
LLAMA3_BLEND = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MAX_RELATIVE_ERROR = 1e-5  # HF's own float32 arithmetic stays near 1e-6; bf16 rounding makes 4e-3


def window_tokens(hf_config: PretrainedConfig) -> int | None:
    """The longest document the model's positions are made for, in tokens; None where the config states none."""
    window = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return reached_tokens(window, _seeing_all(hf_config)) if window else window


def _seeing_all(hf_config: PretrainedConfig) -> list[dict]:
    """RoPE of the layers that see whole documents: of all, or of those of that type."""
    return [part for layer_type, part in rope_parts(hf_config).items() if layer_type in (None, "full_attention")]


def positions_end(hf_config: PretrainedConfig) -> int | None:
    """The longest document that can be trained without `model.rope`, in tokens; None where any can."""
    return None if length_dependent_layers(hf_config) else window_tokens(hf_config)


def apply_rope(hf_config: PretrainedConfig, rope: RopeConfig, max_length_tokens: int) -> None:
    """Stretch `hf_config` in place to `max_length_tokens`: the change is in the built model and in what is saved.

    Per-layer-type RoPE (Gemma-3) is changed for full attention only: a sliding layer never looks past its window.
    Raises ModelError: the length does not fit, the model has no RoPE, or it is stretched already.
    """
    hf_config = hf_config.get_text_config()
    window = window_tokens(hf_config)
    full = _seeing_all(hf_config)
    if rope.type != "none":
        if not rope_parts(hf_config) or window is None:
            raise ModelError(
                f"model.rope.type is {rope.type}, but {hf_config.model_type} has no rotary position embedding to "
                "stretch: set model.rope.type to none"
            )
        if rope.type == "abf" and _bases_by_layer(hf_config):
            raise ModelError(f"model.rope.type is abf, but each layer of {hf_config.model_type} has a base of its own")
        for parameters in full:
            _check_unstretched(rope, parameters)
    endless = bool(length_dependent_layers(hf_config))
    if window is not None and (problem := window_problem(rope, window, max_length_tokens, endless=endless)):
        raise ModelError(problem)
    if rope.type == "none" or window is None:
        return
    for parameters in full:
        parameters.update(_stretched(hf_config, rope, parameters, window, max_length_tokens))
    if rope.type != "dynamic":  # dynamic measures its stretch against max_position_embeddings: it must stay as it was
        by_factor = math.ceil(window * stretch_factor(rope, window, max_length_tokens)) if rope.theta is None else 0
        hf_config.max_position_embeddings = max(window, by_factor, max_length_tokens if rope.theta else 0)
    _check_survives_saving(hf_config, rope)


def check_rope(model: nn.Module, hf_config: PretrainedConfig, document_lengths: Iterable[int] = ()) -> float:
    """Compare the model's live inverse frequencies and attention scaling with the float64 formulas.

    Call it after the last step that touches the model (DeepSpeed's initialize may cast buffers).
    `document_lengths`: where the frequencies depend on the length, those of each of these documents are compared too.
    Returns the worst relative difference.
    Raises ModelError: they differ by more than 1e-5, or no rotary buffers were found although the config states RoPE.
    """
    parts, worst, seen = rope_parts(hf_config), 0.0, set()
    by_length = length_dependent_layers(hf_config)
    for rotary, layer_type, prefix in rotary_modules(model, hf_config):
        seen.add(layer_type)
        # Granite with windows: a base for each layer, and a module for each base
        own = rotary.config if _bases_by_layer(hf_config) else hf_config
        where = f"RoPE ({parts[layer_type]['rope_type']}{', ' + layer_type if layer_type else ''})"
        for length in (None, *(sorted(set(document_lengths)) if layer_type in by_length else ())):
            frequencies, scaling = expected_frequencies(own, layer_type, length)
            live = getattr(rotary, f"{prefix}inv_freq")
            if length is not None and isinstance(rotary.forward, ByDocument):
                live = rotary.forward.frequencies(layer_type, length)
            error = _relative_error(
                (live.detach().double().cpu(), float(getattr(rotary, f"{prefix}attention_scaling", 1.0))),
                (frequencies, scaling),
                where + ("" if length is None else f", document of {length} tokens"),
            )
            worst = max(worst, error)
    kinds = set(getattr(hf_config.get_text_config(), "layer_types", None) or parts)
    missing = {part for part in parts if part is None or part in kinds} - seen  # a config may state kinds it has not
    if missing:
        raise ModelError(
            f"the config of {hf_config.model_type} states RoPE, but the model has no inverse-frequency buffer"
            f"{' for ' + ', '.join(map(str, missing)) if missing != {None} else ''}: what it uses cannot be checked"
        )
    return worst


def _bases_by_layer(hf_config: PretrainedConfig) -> set[float]:
    return {float(base) for base in getattr(hf_config.get_text_config(), "layer_rope_theta", None) or () if base}


def _relative_error(live: tuple[torch.Tensor, float], truth: tuple[torch.Tensor, float], where: str) -> float:
    """The worst of frequencies and scaling. Raises ModelError where it is more than MAX_RELATIVE_ERROR."""
    if live[0].shape != truth[0].shape:
        raise ModelError(
            f"{where}: the model holds {live[0].numel()} inverse frequencies, its config implies {truth[0].numel()}"
        )
    ours, wanted = (
        torch.cat([frequencies, torch.tensor([scaling]).double()]) for frequencies, scaling in (live, truth)
    )
    # a frequency of exactly zero (a part that is not rotated) must be exactly zero in the model too
    relative = (ours - wanted).abs() / torch.where(wanted == 0, torch.tensor(1e-30).double(), wanted.abs())
    worst = float(relative.max())
    if not worst <= MAX_RELATIVE_ERROR:
        hint = " (the size of bf16 rounding: the buffer was cast)" if 1e-4 < worst < 8e-3 else ""
        raise ModelError(
            f"{where}: live inverse frequencies differ from the config's by {worst:.1e} relative{hint}, allowed "
            f"{MAX_RELATIVE_ERROR:.0e}; the model would train with other positions than its config states"
        )
    return worst


def restore_rope(model: nn.Module, hf_config: PretrainedConfig) -> None:
    """Frequencies in float32 again, where building the model rounded them.

    zero.Init makes every float tensor in the model's dtype, also the frequencies. transformers 5.23 computes them again
    after loading, 5.17 does not: theirs differ by up to 2e-3 from the config's. The module itself makes the new ones.
    """
    for rotary, _, prefix in list(rotary_modules(model, hf_config)):
        rounded = getattr(rotary, f"{prefix}inv_freq")
        if rounded.dtype != torch.float32:
            fresh = type(rotary)(rotary.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(rotary, name, buffer.to(rounded.device))


def _check_unstretched(rope: RopeConfig, parameters: dict) -> None:
    present = parameters["rope_type"]
    if present == "default" or (rope.type == "abf" and present not in LENGTH_DEPENDENT):
        return
    raise ModelError(
        f"model.rope.type is {rope.type}, but the model is already stretched with rope type {present!r} "
        f"(factor {parameters.get('factor')}), and two stretches do not add up to a known one: set model.rope.type to "
        "none" + ("" if present in LENGTH_DEPENDENT else " or abf")
    )


def _stretched(
    hf_config: PretrainedConfig, rope: RopeConfig, parameters: dict, window: int, max_length_tokens: int
) -> dict:
    """The keys of `rope_parameters` that change."""
    factor = stretch_factor(rope, window, max_length_tokens)
    if rope.type == "abf":
        exponent = 1 / _critical_share(hf_config, parameters, window)
        theta = rope.theta if rope.theta is not None else parameters["rope_theta"] * factor**exponent
        return {"rope_theta": float(theta)}
    change: dict = {"rope_type": rope.type, "factor": float(factor)}
    if rope.type in ("yarn", "llama3"):
        change["original_max_position_embeddings"] = window
    if rope.type == "llama3":
        change |= LLAMA3_BLEND
    if rope.type == "yarn" and rope.attention_factor is not None:
        change["attention_factor"] = rope.attention_factor
    return change


def _critical_share(hf_config: PretrainedConfig, parameters: dict, window: int) -> float:
    """2i / d of the first pair of dimensions that makes less than one turn in the window; of the last where all turn.

    Angles of the pairs before it were all seen in training, whatever the length; of this one and those behind it only a
    part. A base raised by factor ** (d / 2i) turns it no further in the longer window, and those behind it less. The
    NTK-aware rule, which keeps the last pair's angle instead, lets the ones between turn on into the unknown: with it a
    model trained on 131,072 tokens was lost from 82,000 on (examples/extend_smollm2). Liu et al. 2023,
    arXiv 2310.05209.
    """
    dim = rotary_dim(config_of_type(hf_config, "full_attention"), parameters)
    pairs = dim // 2
    first = math.ceil(pairs * math.log(window / (2 * math.pi)) / math.log(parameters["rope_theta"]))
    return max(1, min(first, pairs - 1)) / pairs


def seen_tokens(hf_config: PretrainedConfig, rope: RopeConfig) -> int | None:
    """Up to which length a base that was given (`abf`) turns no pair of dimensions further than the model has seen.

    `hf_config`: before `apply_rope`. None where no base was given.
    """
    window = window_tokens(hf_config)
    if rope.type != "abf" or rope.theta is None or window is None:
        return None
    reaches = (
        window * (rope.theta / parameters["rope_theta"]) ** _critical_share(hf_config, parameters, window)
        for parameters in _seeing_all(hf_config)
    )
    return round(min(reaches, default=window))


def _check_survives_saving(hf_config: PretrainedConfig, rope: RopeConfig) -> None:
    """Some configs rewrite or refuse a rope type when they are read back (Phi-3 knows longrope only)."""
    try:
        again = type(hf_config).from_dict(hf_config.to_dict())
        same = rope_parts(again) == rope_parts(hf_config)
    except (StrictDataclassError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ModelError(
            f"{hf_config.model_type} cannot hold rope type {rope.type!r} in its config: a saved model would come back "
            f"with another RoPE. Set model.rope.type to abf or none"
        )
