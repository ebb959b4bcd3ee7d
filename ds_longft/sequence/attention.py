"""`ulysses` attention: exchange -> kernel -> exchange back, as one op with its own backward.

Registered with transformers' AttentionInterface, so that any model that uses the interface works unpatched. The batch's
`documents` and the `layout` travel as keyword arguments of `model.forward`; nothing is global.
Being one op, its output can be kept across activation checkpointing (`recompute.py`), so that the kernel's forward, the
largest part of a long step, is not run twice.

Letters: s tokens of this rank, S of the pack, Hq / Hkv heads of the model, h heads of this rank, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ds_longft.batch import Documents
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.exchange import HeadShare, deal_heads, heads_to_tokens, tokens_to_heads
from ds_longft.sequence.kernels import AttentionSpec, choose_kernel, kernel_by_name

ULYSSES = "ulysses"
"""Name under which the attention is registered; goes into `config._attn_implementation`."""


def _group(name: str) -> ProcessGroup | None:
    return _resolve_process_group(name) if name else None


def _repeat_kv(k: Tensor, v: Tensor, share: HeadShare) -> tuple[Tensor, Tensor]:
    """[S, kv received, d] -> [S, kv as the kernel reads them, d]."""
    if share.repeat is None:
        return k, v
    index = torch.tensor(share.repeat, device=k.device)
    return k.index_select(1, index), v.index_select(1, index)


def _sum_repeats(dkv: Tensor, share: HeadShare) -> Tensor:
    """Gradient of `_repeat_kv`: [S, kv as the kernel reads them, d] -> [S, kv received, d]."""
    if share.repeat is None:
        return dkv
    index = torch.tensor(share.repeat, device=dkv.device)
    dtype = torch.promote_types(dkv.dtype, torch.float32)
    total = dkv.new_zeros(dkv.shape[0], len(share.kv), dkv.shape[2], dtype=dtype)
    return total.index_add_(1, index, dkv.to(dtype)).to(dkv.dtype)


@torch.library.custom_op("ds_longft::sp_attention", mutates_args=())
def sp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: list[int],
    kernel: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    group: str,
    sp: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document of a pack that is spread over an sp group.

    q [s, Hq, d], k and v [s, Hkv, d]: this rank's tokens, all heads. cu_seqlens [N + 1] int32 and lengths (N): the whole
    pack. Returns out [s, Hq, d] and the log-sum-exp [h, S] of this rank's heads (kept for the backward pass).
    """
    shares = deal_heads(q.shape[1], k.shape[1], sp)
    spec = AttentionSpec(scale, window, softcap)
    pg = _group(group)
    share = shares[torch.distributed.get_rank(pg)] if pg else shares[0]
    qg, kg, vg = tokens_to_heads([q, k, v], [(x.q, x.kv, x.kv) for x in shares], pg)  # [S, h, d]
    kg, vg = _repeat_kv(kg, vg, share)
    out, lse = kernel_by_name(kernel).forward(qg, kg, vg, cu_seqlens, lengths, spec)  # [S, h, d], [h, S]
    return heads_to_tokens([out], [(x.q,) for x in shares], pg)[0], lse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)


def _backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    lengths, kernel, scale, window, softcap, group, sp = ctx.settings
    shares = deal_heads(q.shape[1], k.shape[1], sp)
    pg = _group(group)
    share = shares[torch.distributed.get_rank(pg)] if pg else shares[0]
    qg, kg, vg, og, dog = tokens_to_heads(
        [q, k, v, out, dout], [(x.q, x.kv, x.kv, x.q, x.q) for x in shares], pg
    )  # [S, h, d], one exchange for all five
    kg, vg = _repeat_kv(kg, vg, share)
    spec = AttentionSpec(scale, window, softcap)
    dq, dk, dv = kernel_by_name(kernel).backward(dog, qg, kg, vg, og, lse, cu_seqlens, lengths, spec)
    del qg, kg, vg, og, dog  # the exchange back needs the memory
    dk, dv = _sum_repeats(dk, share), _sum_repeats(dv, share)
    grads = heads_to_tokens([dq, dk, dv], [(x.q, x.kv, x.kv) for x in shares], pg)  # [s, H, d]
    return (*grads, *(None,) * 8)


sp_attention.register_autograd(_backward, setup_context=_setup_context)


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    layout: ParallelLayout | None = None,
    kernel: str = "auto",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, Hq, s, d], key and value [1, Hkv, s, d] -> [1, s, Hq, d].

    Raises:
        ModelError: the layer asks for something this attention would otherwise have to ignore.
    """
    if documents is None or layout is None:
        raise ModelError("ulysses attention was called without `documents` and `layout`: give both to model.forward")
    refused = {
        "an attention mask": attention_mask is not None,
        f"attention dropout {dropout}": dropout > 0 and module.training,
        "attention sinks": kwargs.get("s_aux") is not None,
        "a batch of several rows (lay them into one pack)": query.shape[0] != 1,
        "attention that is not causal": kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False,
    }
    if any(refused.values()):
        names = ", ".join(name for name, seen in refused.items() if seen)
        raise ModelError(f"{type(module).__name__} asks for {names}, which ulysses attention does not do")
    # [1, H, s, d] -> [s, H, d], views
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if layout.sp > q.shape[1]:
        raise ModelError(f"sp is {layout.sp}, but the model has {q.shape[1]} query heads: sp can be at most that")
    spec = AttentionSpec(scaling if scaling is not None else q.shape[-1] ** -0.5, sliding_window, softcap)
    chosen, _ = choose_kernel(
        kernel, device=q.device, dtype=q.dtype, head_dim=q.shape[-1], spec=spec, lengths=documents.lengths
    )
    out, _ = sp_attention(
        q,
        k,
        v,
        documents.cu_seqlens,
        list(documents.lengths),
        chosen.name,
        spec.scale,
        spec.window,
        spec.softcap,
        layout.group.group_name if layout.group is not None else "",
        layout.sp,
    )
    return out[None], None


def _no_mask(*, attention_mask: Tensor | None = None, **_: Any) -> None:
    """transformers' mask function: documents do the masking, a padding mask is refused rather than dropped."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ModelError("ulysses attention got a padding mask: give the borders of the documents instead")


def register() -> None:
    """Make `attn_implementation="ulysses"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ULYSSES, ulysses_attention)
    AttentionMaskInterface.register(ULYSSES, _no_mask)
