"""Attention of new tokens over prompts whose keys and values lie where the ranks of an sp group read them.

A prompt is read by the training attention, so each rank holds the keys and values of its own slice of tokens: there
they stay. A new token is computed on every rank, asks each rank's keys, and the answers are merged by their
log-sum-exp. The new tokens' own keys are few and the same on every rank.

Letters: B texts side by side, n new tokens of each, s prompt tokens on this rank, P ranks of the sp group, Hq / Hkv
heads, d head size, e size of a value head. Source of the merge: Tree Attention, arXiv 2408.04093.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AttentionInterface, Cache
from transformers.masking_utils import AttentionMaskInterface

from ds_longft.errors import ModelError
from ds_longft.sequence.attention import ulysses_attention
from ds_longft.sequence.kernels.base import AttentionSpec, Job
from ds_longft.sequence.kernels.flash_attn import FlashAttention2
from ds_longft.sequence.mask import AskedMask, asked_mask, window_of

CACHED = "ds_longft_cached"
"""Name under which the attention is registered; goes into `config._attn_implementation`."""


@dataclass(frozen=True)
class OnThisRank:
    """Where the prompt tokens of B texts lie, and how long the texts are."""

    keys: tuple[range, ...]  # [B] of the s prompt tokens of this rank, those of each text
    first: tuple[int, ...]  # [B] position in its text of the first of them
    prompts: tuple[int, ...]  # [B] tokens of each prompt, on all ranks
    prompt_tokens: int  # s, with those of padding
    group: ProcessGroup | None


class PromptCache(Cache):
    """Keys and values of each layer: of this rank's s prompt tokens, in the order of the pack, then B for each step.

    To masks it looks empty: a step is a pack of B texts, whose borders `OnThisRank` knows.
    """

    def __init__(self, room_tokens: int) -> None:
        """`room_tokens`: for all new tokens of all texts."""
        super().__init__(layers=[])
        self.room_tokens = room_tokens
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}  # [1, Hkv, s + room, d or e]
        self._filled: dict[int, int] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """key [1, Hkv, t, d] and value [1, Hkv, t, e] are put behind what is there. The prompt's come back as they are,
        for the training attention; with a step's, all there is.
        """
        tokens = key_states.shape[2]
        is_prompt = layer_idx not in self._stored
        if is_prompt:
            room = tokens + self.room_tokens
            keys, values = (x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (key_states, value_states))
            self._stored[layer_idx], self._filled[layer_idx] = (keys, values), 0
        start = self._filled[layer_idx]
        self._filled[layer_idx] = end = start + tokens
        for stored, new in zip(self._stored[layer_idx], (key_states, value_states), strict=True):
            stored[:, :, start:end] = new
        if is_prompt:
            return key_states, value_states
        keys, values = self._stored[layer_idx]
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """For masks."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """For masks: (keys, offset)."""
        return query_length, 0

    @property
    def layers_seen(self) -> int:
        """How many layers have put their keys here."""
        return len(self._stored)


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    on_this_rank: OnThisRank | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. Inference only.

    A prompt, which comes with `documents` and `layout`, is read by `ulysses_attention`. A step comes with
    `on_this_rank`: query [1, Hq, B, d] over key [1, Hkv, s + B n, d] and value [1, Hkv, s + B n, e] of a `PromptCache`,
    step by step behind the prompts -> [1, B, Hq, e].

    attention_mask: the `AskedMask` of the layer's kind, or None where the model makes none.

    Raises:
        ModelError: the layer is not causal, or its mask is another than a sliding window.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if on_this_rank is None:
        asked: dict[str, Any] = {"scaling": scale, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return ulysses_attention(module, query, key, value, attention_mask, **asked, **kwargs)
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{type(module).__name__} is not causal: only causal language models can be evaluated")
    new = (key.shape[2] - on_this_rank.prompt_tokens) // len(on_this_rank.prompts)  # n, with this one
    places = [prompt + new - 1 for prompt in on_this_rank.prompts]
    chunk = attention_mask.chunk_tokens if isinstance(attention_mask, AskedMask) else None
    if chunk is not None:  # Llama 4
        lowest = [place // chunk * chunk for place in places]
    else:
        window = window_of(type(module).__name__, attention_mask, sliding_window)
        lowest = [0 if window is None else max(0, place + 1 - window) for place in places]
    if (temperature := getattr(module, "query_temperature", None)) is not None:
        query = temperature.tuned_at(query, torch.tensor(places, device=query.device))
    return _step(query, key, value, on_this_rank, scale, lowest, softcap, s_aux), None


def _step(
    query: Tensor, key: Tensor, value: Tensor, here: OnThisRank, scale: float, lowest: Sequence[int],
    softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """One new token of each text, the last of the keys: [1, B, Hq, e]. `lowest` [B]: the first position it sees."""
    texts, s = len(here.prompts), here.prompt_tokens
    new = (key.shape[2] - s) // texts  # n, with this one
    parts = []
    for b, (keys, first, low) in enumerate(zip(here.keys, here.first, lowest, strict=True)):
        unseen = max(0, low - first)
        seen = slice(min(keys.start + unseen, keys.stop), keys.stop)
        parts.append(_attend(query[:, :, b : b + 1], key[:, :, seen], value[:, :, seen], scale, softcap))
    of_prompts = torch.cat(parts)  # [B, Hq, e + 1]
    everywhere = [of_prompts]
    if here.group is not None:
        everywhere = [torch.empty_like(of_prompts) for _ in range(dist.get_world_size(here.group))]
        dist.all_gather(everywhere, of_prompts, group=here.group)
    k, v = (x[0, :, s:].unflatten(1, (new, texts)).permute(2, 0, 1, 3) for x in (key, value))  # [B, Hkv, n, d]
    q = query[0].transpose(0, 1)[:, :, None]  # [B, Hq, 1, d]
    skip = [max(0, low - prompt) for low, prompt in zip(lowest, here.prompts, strict=True)]  # of the n
    together = [slice(0, texts)] if len(set(skip)) == 1 else [slice(b, b + 1) for b in range(texts)]
    of_new = torch.cat(
        [_attend(q[of], k[of, :, skip[of.start] :], v[of, :, skip[of.start] :], scale, softcap) for of in together]
    )
    return _merged([*everywhere, of_new], sinks).to(query.dtype)[None]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
    """query [B, Hq, 1, d] over all keys [B, Hkv, m, d], which may be none: [B, Hq, e + 1] in at least float32, the
    attention's output and, last, its log-sum-exp.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, _, d = query.shape
    if not key.shape[2]:
        nothing = query.new_zeros(batch, heads, value.shape[-1] + 1, dtype=wide)
        nothing[..., -1] = -torch.inf
        return nothing
    if softcap is None and d == value.shape[-1] and _flash_fits(query):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, tokens, H, d]
        out, lse = torch.ops.aten._flash_attention_forward(
            q, k, v, cum_seq_q=None, cum_seq_k=None, max_q=1, max_k=k.shape[1], dropout_p=0.0, is_causal=False,
            return_debug_mask=False, scale=scale,
        )[:2]  # fmt: skip
        return torch.cat([out[:, 0].to(wide), lse.to(wide)], -1)  # [B, Hq, d], [B, Hq, 1]
    q = query.to(wide).unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # [B, Hkv, g, d]
    scores = q @ key.to(wide).transpose(2, 3) * scale  # [B, Hkv, g, m]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lse = scores.logsumexp(-1, keepdim=True)
    return torch.cat([torch.exp(scores - lse) @ value.to(wide), lse], -1).flatten(1, 2)


def _merged(parts: Sequence[Tensor], sinks: Tensor | None) -> Tensor:
    """Attention over all keys from that over each part of them, [B, Hq, e + 1] each: [B, Hq, e].

    sinks [Hq]: one more key of each head, whose value is zero.
    """
    stacked = torch.stack(list(parts))
    lse = stacked[..., -1]  # [P + 1, B, Hq]
    total = lse.logsumexp(0)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(total.dtype))
    return (stacked[..., :-1] * torch.exp(lse - total)[..., None]).sum(0)


def _flash_fits(query: Tensor) -> bool:
    capability = torch.cuda.get_device_capability(query.device) if query.is_cuda else None
    job = Job(query.device.type, query.dtype, query.shape[-1], AttentionSpec(1.0), capability)
    return FlashAttention2().refuses(job, here=False) is None


def register() -> None:
    """Make the name known to transformers; calling it again changes nothing."""
    AttentionInterface.register(CACHED, cached_attention)
    AttentionMaskInterface.register(CACHED, asked_mask)
