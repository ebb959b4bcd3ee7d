"""`ulysses` attention: exchange -> kernel -> exchange back, as one autograd function.

Where each rank of a group holds whole documents, the kernel alone. Registered with transformers' AttentionInterface, so
that any model that uses the interface works unpatched. The batch's `documents` and the `layout` travel as keyword
arguments of `model.forward`; nothing is global. Its output can be kept across activation checkpointing (`kept`), so
that the kernel's forward, the largest part of a long step, is not run twice.

Letters: s tokens of this rank, S of the pack, Hq / Hkv heads of the model, h heads of this rank, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ds_longft.batch import Documents
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.exchange import (
    Buffers,
    HeadShare,
    deal_heads,
    deal_in_turns,
    heads_into,
    heads_to_tokens,
    shared_heads,
    tokens_to_heads,
)
from ds_longft.sequence.kept import Kept, computed_once
from ds_longft.sequence.kernels import AttentionSpec, Kernel, Saved, choose_kernel
from ds_longft.sequence.kernels.flash_attn import FlashAttention4
from ds_longft.sequence.llama4 import tunes_by_place
from ds_longft.sequence.mask import AskedMask, asked_mask, window_of
from ds_longft.sequence.reuse import ours_alone

ULYSSES = "ulysses"
"""Name under which the attention is registered; goes into `config._attn_implementation`."""


def _add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with one more key per head whose score is its sink and whose value is zero (gpt-oss).

    out [S, h, d], lse [h, S], sinks [h]. Both results are exact: the sink only enlarges the softmax's sum. The kernels'
    backward is right as it stands when it is given these two, since it rebuilds the weights as exp(score - lse).
    """
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    share = torch.exp(lse - with_sink).transpose(0, 1)[..., None]  # [S, h, 1]: what the sink leaves to the real keys
    return (out.to(lse.dtype) * share).to(out.dtype), with_sink


def _sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """[h]: minus the sink's weight times (dout . out), summed over the tokens."""
    weight = torch.exp(sinks.to(lse.dtype)[:, None] - lse)  # [h, S]
    products = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # [S, h]
    return -(weight * products.transpose(0, 1)).sum(1)


def _attend(call: _Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """The kernel, and the sinks of these heads: inside flash-attn-4, or added to what another kernel gives.

    That costs a few copies of `out` in float32: 2 GiB each for 131,072 tokens of 64 heads of 64.
    """
    if sinks is not None and isinstance(call.kernel, FlashAttention4):
        return call.kernel.forward(q, k, v, call.documents, call.spec, sinks)
    out, lse = call.kernel.forward(q, k, v, call.documents, call.spec)  # [S, h, d], [h, S]
    return (out, lse) if sinks is None else _add_sinks(out, lse, sinks)


def _attend_backward(
    call: _Call, dout: Tensor, saved: Saved, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and of the sinks of these heads, where they are trained."""
    if sinks is not None and isinstance(call.kernel, FlashAttention4) and not call.spec.repeatable:
        dq, dk, dv, dsinks = call.kernel.backward(dout, saved, call.documents, call.spec, sinks)
        return dq, dk, dv, dsinks
    grads = call.kernel.backward(dout, saved, call.documents, call.spec)
    return *grads, None if sinks is None else _sinks_gradient(dout, saved.out, saved.lse, sinks)


@dataclass(frozen=True)
class _Call:
    """Everything about one attention but what is computed with."""

    documents: Documents  # of the whole pack
    kernel: Kernel
    spec: AttentionSpec
    group: ProcessGroup | None
    shares: tuple[HeadShare, ...]
    share: HeadShare  # this rank's
    turns: tuple[tuple[HeadShare, ...], ...] = ()  # where heads are worked on some at a time: the shares of each turn
    rank: int = 0  # in the sp group


class SpAttention(torch.autograd.Function):
    """Causal attention inside each document of a pack that is spread over an sp group."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call, kept: Kept | None
    ) -> Tensor:
        """q [s, Hq, d], k and v [s, Hkv, d]: this rank's tokens, all heads. sinks [Hq]: where the model has them.

        Returns out [s, Hq, d]. The log-sum-exp [h, S] of this rank's heads is saved beside it.
        """
        forward = _forward_in_turns if call.turns else _forward_at_once
        out, lse = computed_once(kept, lambda: forward(q, k, v, sinks, call))
        ctx.save_for_backward(q.detach(), k.detach(), v.detach(), sinks, out, lse)  # see `ours_alone`
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """One exchange for q, k, v, out and dout; the kernel; one exchange back for the gradients."""
        q, k, v, sinks, out, lse = ctx.saved_tensors
        call: _Call = ctx.call
        if not ctx.needs_input_grad[3]:
            sinks = None  # frozen, as under LoRA: the kernels' backward does without, it has `out` and `lse`
        if call.turns:
            return (*_backward_in_turns(q, k, v, sinks, out, lse, dout, call), None, None)
        ranges = [(x.q, x.kv, x.kv, x.q, x.q) for x in call.shares]
        qg, kg, vg, og, dog = tokens_to_heads([q, k, v, out, dout], ranges, call.group)  # [S, h, d]
        kg, vg = call.share.repeated(kg), call.share.repeated(vg)
        mine = slice(call.share.q.start, call.share.q.stop)
        of_heads = None if sinks is None else sinks[mine]
        dq, dk, dv, part = _attend_backward(call, dog, Saved(qg, kg, vg, og, lse), of_heads)
        dsinks = None
        if part is not None:  # the tokens of the whole pack, this rank's heads: the other ranks' heads get zero here
            dsinks = torch.zeros_like(sinks)
            dsinks[mine] = part.to(dsinks.dtype)
        del qg, kg, vg, og, dog  # the exchange back needs the memory
        dk, dv = call.share.summed(dk), call.share.summed(dv)
        grads = heads_to_tokens([dq, dk, dv], [(x.q, x.kv, x.kv) for x in call.shares], call.group)  # [s, H, d]
        return (*grads, dsinks, None, None)


def _forward_at_once(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
    """`SpAttention.forward`, all of this rank's heads: out [s, Hq, d], lse [h, S]."""
    ranges = [(x.q, x.kv, x.kv) for x in call.shares]
    qg, kg, vg = tokens_to_heads([q, k, v], ranges, call.group)  # [S, h, d]
    kg, vg = call.share.repeated(kg), call.share.repeated(vg)
    of_heads = None if sinks is None else sinks[call.share.q.start : call.share.q.stop]
    out, lse = _attend(call, qg, kg, vg, of_heads)  # [S, h, d], [h, S]
    return heads_to_tokens([out], [(x.q,) for x in call.shares], call.group)[0], lse


def _forward_in_turns(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
    """`SpAttention.forward`, a few key/value heads and their queries at a time: out [s, Hq, d], lse [h, S].

    The exchange and the kernel then need memory for those heads only.
    """
    buffers, out = Buffers(), torch.empty_like(q, memory_format=torch.contiguous_format)
    lse: Tensor | None = None
    for shares in call.turns:
        mine = shares[call.rank]
        ranges = [(x.q, x.kv, x.kv) for x in shares]
        qg, kg, vg = tokens_to_heads([q, k, v], ranges, call.group, buffers)  # [S, h of this turn, d]
        part = qg
        if mine.q:
            heads = mine.repeated(kg), mine.repeated(vg)
            of_heads = None if sinks is None else sinks[mine.q.start : mine.q.stop]
            part, part_lse = _attend(call, qg, *heads, of_heads)
            if lse is None:
                lse = part_lse.new_empty(len(call.share.q), part_lse.shape[1])
            lse[mine.q.start - call.share.q.start : mine.q.stop - call.share.q.start] = part_lse
        heads_into([out], [part], [(x.q,) for x in shares], call.group, buffers, (False,))
        del qg, kg, vg, part
    assert lse is not None
    return out, lse


def _backward_in_turns(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`SpAttention.backward` in the same turns. A kv head that two ranks hold is summed in at least float32.

    Writes over those of q, k and v that nothing else reads. Layers with two attentions share them (DiffLlama), and so
    do layers that read the keys and values of an earlier one (Gemma 3n).
    """
    buffers = Buffers()
    wide = shared_heads(call.shares)
    dtype = torch.promote_types(k.dtype, torch.float32) if wide else k.dtype
    # A turn has read its heads of q, k and v before it writes their gradients: those can take their place.
    dq, dk, dv = (x if ours_alone(x) else torch.empty_like(x) for x in (q, k, v))
    if wide:
        dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    dsinks = torch.zeros_like(sinks) if sinks is not None else None
    for shares in call.turns:
        mine = shares[call.rank]
        ranges = [(x.q, x.kv, x.kv, x.q, x.q) for x in shares]
        qg, kg, vg, og, dog = tokens_to_heads([q, k, v, out, dout], ranges, call.group, buffers)
        buffers.sent = None  # the kernel needs the memory
        grads = (qg, kg, vg)  # empty, where this rank has no head in this turn
        if mine.q:
            rows = slice(mine.q.start - call.share.q.start, mine.q.stop - call.share.q.start)
            part = lse[rows].contiguous()
            heads = mine.repeated(kg), mine.repeated(vg)
            dqg, dkg, dvg = call.kernel.backward(dog, Saved(qg, *heads, og, part), call.documents, call.spec)
            grads = dqg, mine.summed(dkg), mine.summed(dvg)
            del dqg, dkg, dvg
            if dsinks is not None and sinks is not None:
                heads_here = slice(mine.q.start, mine.q.stop)
                dsinks[heads_here] = _sinks_gradient(dog, og, part, sinks[heads_here]).to(sinks.dtype)
        back = [(x.q, x.kv, x.kv) for x in shares]
        heads_into([dq, dk, dv], grads, back, call.group, buffers, (False, wide, wide))
        del qg, kg, vg, og, dog, grads  # gone before the next turn's are made
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    documents: Documents | None = None,
    layout: ParallelLayout | None = None,
    kernel: str = "auto",
    kept: Kept | None = None,
    kv_heads_at_a_time: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, Hq, s, d], key [1, Hkv, s, d], value [1, Hkv, s, e] -> [1, s, Hq, e].

    attention_mask: the `AskedMask` of the layer's kind, or None where the model makes none.
    Raises ModelError: the layer asks for something this attention would otherwise have to ignore.
    """
    if documents is None or layout is None:
        raise ModelError(
            f"{type(module).__name__} called its attention without `documents` and `layout`: the model does not hand "
            "on what its forward gets by keyword, and without the borders of documents they would see each other; it "
            "can be trained once its code in transformers hands them on"
        )
    refused = {
        f"attention dropout {dropout}": dropout > 0 and module.training,
        "a batch of several rows (lay them into one pack)": query.shape[0] != 1,
        "queries scaled by the place in a slice": tunes_by_place(module),
        "attention that is not causal": kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False,
    }
    if any(refused.values()):
        names = ", ".join(name for name, seen in refused.items() if seen)
        raise ModelError(f"{type(module).__name__} asks for {names}, which ulysses attention does not do")
    sp, sp_rank, group = layout.sp, layout.sp_rank, layout.group
    if documents.own is not None:
        documents, sp, sp_rank, group = documents.own, 1, 0, None  # nobody else has a part of these
    if (temperature := getattr(module, "query_temperature", None)) is not None:
        query = temperature.tuned(query, documents, sp_rank)
    # [1, H, s, d] -> [s, H, d], views; not t[0], whose backward pass fills zeros and copies. Exchange and kernels know
    # one d: where value heads have another (DeepSeek), zeros make up for it, which add nothing to scores.
    d = max(query.shape[-1], value.shape[-1])
    q, k, v = (_wide(t.squeeze(0).transpose(0, 1), d) for t in (query, key, value))
    if layout.sp > q.shape[1]:
        raise ModelError(f"sp is {layout.sp}, but the model has {q.shape[1]} query heads: sp can be at most that")
    if isinstance(attention_mask, AskedMask) and attention_mask.chunk_tokens is not None:
        documents, attention_mask = cut(documents, attention_mask.chunk_tokens), None
    window = window_of(type(module).__name__, attention_mask, sliding_window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    spec = AttentionSpec(scale, window, softcap, torch.are_deterministic_algorithms_enabled())
    heads = -(-q.shape[1] // sp)
    chosen, _ = choose_kernel(
        kernel, device=q.device, dtype=q.dtype, heads=heads, head_dim=d, spec=spec, lengths=documents.lengths
    )
    shares = deal_heads(q.shape[1], k.shape[1], sp)
    turns: tuple[tuple[HeadShare, ...], ...] = ()
    if kv_heads_at_a_time is not None and kv_heads_at_a_time < max(len(share.kv) for share in shares):
        turns = deal_in_turns(q.shape[1], k.shape[1], sp, kv_heads_at_a_time)
    call = _Call(documents, chosen, spec, group, shares, shares[sp_rank], turns, sp_rank)
    out = SpAttention.apply(q, k, v, s_aux, call, kept)
    return out[None, ..., : value.shape[-1]], None


@lru_cache(maxsize=8)
def _cut_lengths(lengths: tuple[int, ...], chunk_tokens: int) -> tuple[int, ...]:
    return tuple(min(chunk_tokens, n - start) for n in lengths for start in range(0, n, chunk_tokens))


def cut(documents: Documents, chunk_tokens: int) -> Documents:
    """Documents cut into chunks from their start (Llama 4): a chunk is to its attention what a document is."""
    lengths = _cut_lengths(documents.lengths, chunk_tokens)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Documents(borders.to(documents.cu_seqlens.device, non_blocking=True), lengths)


def _wide(t: Tensor, d: int) -> Tensor:
    """[s, H, n] -> [s, H, d], zeros behind."""
    return t if t.shape[-1] == d else F.pad(t, (0, d - t.shape[-1]))


def register() -> None:
    """Make `attn_implementation="ulysses"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ULYSSES, ulysses_attention)
    AttentionMaskInterface.register(ULYSSES, asked_mask)
