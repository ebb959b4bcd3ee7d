"""Attention of new tokens over a KV cache: what reading a long prompt in chunks and generating from it needs.

A prompt of 131,072 tokens is read a few thousand tokens at a time. The queries of a chunk see all keys in the cache and
the keys of the chunk up to themselves. transformers' own sdpa would make a mask of chunk x prompt for that, on GPUs
FlashAttention aligns the causal triangle to the end of the keys by itself.

Letters: B prompts of one length, n new tokens, m keys (cache and new), Hq / Hkv heads, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ds_longft.errors import ModelError
from ds_longft.sequence.kernels.base import AttentionSpec, Job, flash_refusal
from ds_longft.sequence.mask import asked_mask, window_of

CACHED = "ds_longft_cached"
"""Name under which the attention is registered; goes into `config._attn_implementation`."""

SCORES = 1 << 26
"""Scores (or mask entries) held at once on the way that materialises them."""


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, Hq, n, d], key and value [B, Hkv, m, d] -> [B, n, Hq, d].

    The n queries are the last n of the m positions; there is no padding. Inference only.

    attention_mask: the `AskedMask` of the layer's kind, or None where the model makes none.

    Raises:
        ModelError: the layer is not causal, or its mask is another than a sliding window.
    """
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{type(module).__name__} is not causal: only causal language models can be evaluated")
    sliding_window = window_of(type(module).__name__, attention_mask, sliding_window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if sliding_window is not None:  # keys no query can see
        keep = sliding_window + query.shape[2] - 1
        key, value = key[:, :, -keep:], value[:, :, -keep:]
    window = sliding_window if sliding_window is not None and sliding_window < key.shape[2] else None
    if softcap is None and s_aux is None and query.shape[-1] == value.shape[-1] and _flash_fits(query):
        return _flash(query, key, value, scale, window), None
    step = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    before = key.shape[2] - query.shape[2]
    outs = []
    for a in range(0, query.shape[2], step):
        part = query[:, :, a : a + step]
        last = before + a + part.shape[2]
        outs.append(_masked(part, key[:, :, :last], value[:, :, :last], scale, window, softcap, s_aux))
    return torch.cat(outs, 2).transpose(1, 2), None


def _flash_fits(query: Tensor) -> bool:
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    job = Job(query.device.type, query.dtype, query.shape[-1], AttentionSpec(1.0), capability)
    return flash_refusal(job, oldest=(8, 0)) is None


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """FlashAttention 2 inside torch: grouped kv heads natively, the causal triangle at the end of the keys."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, tokens, H, d]
    return torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cum_seq_q=None,
        cum_seq_k=None,
        max_q=q.shape[1],
        max_k=k.shape[1],
        dropout_p=0.0,
        is_causal=True,
        return_debug_mask=False,
        scale=scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The definition, for the last queries of the keys: [B, Hq, n, d]."""
    n, m, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    rows = torch.arange(m - n, m, device=query.device)[:, None]
    columns = torch.arange(m, device=query.device)
    visible = columns <= rows
    if window is not None:
        visible &= columns > rows - window
    if softcap is None and sinks is None:
        mask = visible if n > 1 or window is not None else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = (query.float() @ key.float().transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], 3)
    weights = scores.softmax(-1)[..., :m]
    return (weights @ value.float()).to(query.dtype)


def register() -> None:
    """Make the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(CACHED, cached_attention)
    AttentionMaskInterface.register(CACHED, asked_mask)
