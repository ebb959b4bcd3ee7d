"""Which mask a layer asks for. No mask is made here, the borders of documents do it; but what was asked must be done.

Models tell transformers by a function of two positions, one for each kind of layer. Some tell their attention too (a
sliding window as a keyword), some do not: the window is in the mask alone. So the function is asked at positions that
tell causal masks and windows of any length apart from everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ds_longft.errors import ModelError

MaskFunction = Callable[[Any, Any, Tensor, Tensor], Tensor]
"""transformers': (batch index, head, query's position, key's position) -> whether the query sees the key."""

FARTHEST = 1 << 40
"""Tokens: no window is as long."""


@dataclass(frozen=True)
class AskedMask:
    """What a layer gets in place of a mask."""

    causal: bool  # a token sees itself and tokens before it, with or without a window
    window_tokens: int | None  # the token itself and window - 1 before it
    chunk_tokens: int | None = None  # tokens of a chunk; a token sees those before it in its own chunk

    def __getitem__(self, index: Any) -> AskedMask:
        """All of it (Gemma 4 leaves out tokens before its last layers, and here none)."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice) and part in (slice(None), slice(0, None)) for part in parts):
            raise ModelError("the model takes a part of its attention mask, and here there is none")
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ModelError(f"the model computes with its attention mask (`{name}`), and here there is none")


def no_padding(tokens: int, device: torch.device) -> Tensor:
    """An attention mask [1, tokens] that says there is no padding, to give to a decoder.

    Without one, transformers looks for documents in the positions, at the cost of a synchronisation, and mixes their
    borders into the mask function. One element is expanded: that it says the same of all is known without reading it.
    """
    return torch.ones(1, 1, dtype=torch.bool, device=device).expand(1, tokens)


def asked_mask(
    *, mask_function: MaskFunction, attention_mask: Tensor | None = None, local_size: int | None = None, **_: Any
) -> AskedMask:
    """transformers' mask function, registered for our attention. `local_size`: the window, where transformers says it.
    Raises ModelError: a padding mask, which would be dropped.
    """
    if attention_mask is not None and not pads_nothing(attention_mask):
        raise ModelError("the model got a padding mask, which is not looked at here: give documents without padding")
    for window in (local_size, None):
        if _is_causal(mask_function, window):
            return AskedMask(True, window)
    if local_size and _is_causal(mask_function, None, local_size):
        return AskedMask(False, None, local_size)
    window = _window(mask_function)
    return AskedMask(_is_causal(mask_function, window), window)


def pads_nothing(mask: Tensor) -> bool:
    """Whether a mask [.., tokens] is `no_padding`'s, or true of every token."""
    return mask.dim() == 2 and (mask.stride(1) == 0 or bool(mask.all()))


def window_of(layer: str, mask: Any, keyword: int | None) -> int | None:
    """The sliding window in tokens of a layer that got this mask, and this window as its attention's keyword.
    Raises ModelError: any other mask than a causal one with or without a window, or two windows that contradict.
    """
    if isinstance(mask, Tensor) and pads_nothing(mask):
        mask = None  # handed on as it was given to the decoder
    if mask is not None and not (isinstance(mask, AskedMask) and mask.causal):
        raise ModelError(
            f"{layer} asks for a mask that is neither causal nor a causal sliding window: its attention cannot be done "
            "exactly here"
        )
    if mask is None or mask.window_tokens == keyword:
        return keyword
    if keyword is None:
        return mask.window_tokens
    raise ModelError(
        f"{layer} tells its attention a sliding window of {keyword} tokens, and its mask has "
        f"{'none' if mask.window_tokens is None else mask.window_tokens}: which one counts is not known"
    )


def _is_causal(function: MaskFunction, window: int | None, chunk: int | None = None) -> bool:
    """Whether the function is the causal mask with this window, or these chunks, at all positions that are tried."""
    edge = window or chunk or 3
    queries = {0, 1, 2, 3, 7, 30, 64, 1000, 8191, 123_457, edge - 1, edge, edge + 1, 2 * edge + 3, FARTHEST}
    back = {-FARTHEST, -1000, -2, -1, 0, 1, 2, 3, 5, 63, edge - 2, edge - 1, edge, edge + 1, 2 * edge}
    back |= {1 << i for i in range(41)}
    q, distance = torch.tensor(sorted(queries))[:, None], torch.tensor(sorted(back))[None]
    expected = (distance >= 0) & (distance < (window or 2 * FARTHEST))
    if chunk is not None:
        expected = expected & (q // chunk == (q - distance) // chunk)
    seen = _asked(function, q, q - distance)
    return seen is not None and bool((seen == expected)[q >= distance].all())


def _window(function: MaskFunction) -> int | None:
    """How many tokens a token far from the start sees, if it is a window; by bisection."""
    q, low, high = torch.tensor(FARTHEST), 0, FARTHEST
    while high - low > 1:
        middle = (low + high) // 2
        seen = _asked(function, q, q - middle)
        if seen is None:
            return None
        low, high = (middle, high) if bool(seen) else (low, middle)
    return high


class _NoLookup(TorchFunctionMode):
    """Inside, nothing is looked up in a tensor by position: on a GPU these, beyond its end, would break the process.

    What has one element for our one row is read: how far it is padded on the left (none), which chunks start from.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and args[0].shape == (1,):
            with torch._C.DisableTorchFunction():
                return args[0][0].cpu()
        if func is Tensor.__getitem__:
            raise IndexError("the mask depends on more than positions")
        return func(*args, **(kwargs or {}))


def _asked(function: MaskFunction, q: Tensor, kv: Tensor) -> Tensor | None:
    """Whether the queries see the keys, for two heads alike; None where the function depends on more than positions."""
    answers = []
    for head in (0, 1):
        try:
            with _NoLookup():
                seen = function(torch.tensor(0), torch.tensor(head), q, kv)
        except (IndexError, RuntimeError, TypeError, ValueError):
            return None
        answers.append(torch.as_tensor(seen).cpu().expand(torch.broadcast_shapes(q.shape, kv.shape)))
    return answers[0] if torch.equal(*answers) else None
