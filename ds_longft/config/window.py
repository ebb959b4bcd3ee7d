"""How far a model's positions reach, and whether `model.rope` stretches them to the longest row.

One rule for `config.json` before torch is imported (`model_json`) and for the loaded config (`model.rope`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ds_longft.config.model_keys import RopeConfig


def reached_tokens(window: int, parts: Iterable[Mapping[str, Any]]) -> int:
    """The longest document: `window`, or what a stretch in the RoPE parameters `parts` makes of it.

    Model cards say how to write YaRN into a config, and to leave the window as it was: then it reaches factor times as
    far. With linear some leave the window alone and some do not, so that only a stated original tells.
    """
    reached = window
    for part in parts:
        kind, original = part.get("rope_type", part.get("type")), part.get("original_max_position_embeddings")
        if kind in ("yarn", "linear"):
            known = original or (window if kind == "yarn" else 0)
            reached = max(reached, int(known * (part.get("factor") or 1.0)))
    return reached


def stretch_factor(rope: RopeConfig, window: int, max_length_tokens: int) -> float:
    """`model.rope.factor`, or the one that reaches the longest row."""
    return rope.factor if rope.factor is not None else max_length_tokens / window


def window_problem(rope: RopeConfig, window: int, max_length_tokens: int, *, endless: bool) -> str | None:
    """Why rows of this length do not fit the window with this stretch; `endless`: RoPE chosen by the length."""
    if rope.type == "none":
        if endless or max_length_tokens <= window:
            return None
        return (
            f"data.max_length_tokens is {max_length_tokens}, the model's window is {window} tokens: lower the first, "
            "or stretch the window with model.rope.type (yarn, llama3, abf, linear or dynamic)"
        )
    if rope.type == "abf" and rope.theta is not None:
        return None
    factor = stretch_factor(rope, window, max_length_tokens)
    if factor <= 1:
        return (
            f"model.rope.type is {rope.type}, but data.max_length_tokens ({max_length_tokens}) lies inside the model's "
            f"window of {window} tokens: set model.rope.type to none, or give "
            f"{'model.rope.theta' if rope.type == 'abf' else 'model.rope.factor'}"
        )
    if window * factor < max_length_tokens and rope.type != "dynamic":
        return (
            f"model.rope.factor {factor:g} stretches the window of {window} to {int(window * factor)} tokens, less "
            f"than data.max_length_tokens ({max_length_tokens}): leave the factor out, or give at least "
            f"{max_length_tokens / window:g}"
        )
    return None
