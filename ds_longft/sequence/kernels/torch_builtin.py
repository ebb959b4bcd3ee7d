"""The kernels inside torch: cuDNN, FlashAttention 2 and the one for wide heads on GPUs, flash attention on CPUs.

Nothing to install. All but FlashAttention 2 are called once for each document, on slices of the pack. The arguments
are those of torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_longft.sequence.kernels.base import (
    NOT_REPEATABLE,
    AttentionSpec,
    Gradients,
    Job,
    Saved,
    flash_refusal,
    flash_window_left,
    refusal,
    spans,
)
from ds_longft.sequence.kernels.math_kernel import MathKernel

aten = torch.ops.aten

CAUSAL, LSE_ALIGNMENT = 1, 32
"""Of memory-efficient attention: the code of its causal mask, and of how many tokens its log-sum-exp is a multiple."""


def _heads_first(x: Tensor) -> Tensor:
    """[L, h, d] -> [1, h, L, d], a view."""
    return x.transpose(0, 1)[None]


def _tokens_first(x: Tensor) -> Tensor:
    """[1, h, L, d] -> [L, h, d], a view."""
    return x[0].transpose(0, 1)


class CudnnKernel:
    """cuDNN's fused attention, in every CUDA build of torch; grouped kv heads natively.

    Fast on long documents. cuDNN plans each document length it has not seen before, which is why many documents of
    ever new lengths belong to a varlen kernel (see `table.CUDNN_MIN_WORK`).
    """

    name = "cudnn"

    def refuses(self, job: Job, *, here: bool = True) -> str | None:
        dtype, head_dim, spec, capability = job.dtype, job.head_dim, job.spec, job.capability
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        return refusal(
            (job.device_type != "cuda", f"runs on cuda, not on {job.device_type}"),
            (dtype not in (torch.bfloat16, torch.float16), f"takes bf16 and fp16, not {dtype}"),
            (capability is None or capability < (8, 0), f"needs compute capability 8.0, this GPU has {capability}"),
            (head_dim > 128 or head_dim % 8 != 0, f"takes head dimensions up to 128 in steps of 8, not {head_dim}"),
            (spec.window is not None, f"has no sliding window (asked for {spec.window})"),
            (spec.softcap is not None, f"has no softcap (asked for {spec.softcap})"),
            (spec.repeatable, NOT_REPEATABLE),
            (here and (version is None or version < 90000), f"needs cuDNN 9 in torch, found {version}"),
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        assert spec.softcap is None
        assert spec.window_for(lengths) is None
        if len(lengths) == 1 and lengths[0] > 1:
            return self._forward_one(q, k, v, spec)  # no copy of the output
        out = q.new_empty(q.shape)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        for a, b in spans(lengths):
            forward_one = self._forward_one if b - a > 1 else _forward_one_token
            out[a:b], lse[:, a:b] = forward_one(q[a:b], k[a:b], v[a:b], spec)
        return out, lse

    def backward(
        self, dout: Tensor, saved: Saved, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> Gradients:
        q, k, v, out, lse = saved
        assert spec.softcap is None
        assert spec.window_for(lengths) is None
        if len(lengths) == 1 and lengths[0] > 1:
            return self._backward_one(dout, saved, spec)
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        for a, b in spans(lengths):
            one = Saved(q[a:b], k[a:b], v[a:b], out[a:b], lse[:, a:b])
            if b - a == 1:  # which cuDNN does not take; by lse, so that it is right beside attention sinks too
                dq[a:b], dk[a:b], dv[a:b] = MathKernel().backward(dout[a:b], one, documents_cu, [1], spec)
                continue
            dq[a:b], dk[a:b], dv[a:b] = self._backward_one(dout[a:b], one, spec)
        return dq, dk, dv

    def _forward_one(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *map(_heads_first, (q, k, v)), attn_bias=None, compute_log_sumexp=True, dropout_p=0.0, is_causal=True,
            return_debug_mask=False, scale=spec.scale,
        )  # fmt: skip
        return _tokens_first(out).contiguous(), lse.reshape(q.shape[1], q.shape[0])

    def _backward_one(self, dout: Tensor, saved: Saved, spec: AttentionSpec) -> Gradients:
        q, k, v, out, lse = saved
        seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))  # read by dropout only
        # torch caches cuDNN's plans by the strides of q, k, v only: the others must come in one layout every time.
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *map(_heads_first, (dout.contiguous(), q, k, v, out.contiguous())), lse.contiguous()[None, :, :, None],
            philox_seed=seed, philox_offset=offset, attn_bias=None, cum_seq_q=None, cum_seq_k=None, max_q=len(q),
            max_k=len(q), dropout_p=0.0, is_causal=True, scale=spec.scale,
        )  # fmt: skip
        dq, dk, dv = (_tokens_first(grad) for grad in grads)
        return dq, dk, dv


def _forward_one_token(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Attention of a one-token document, which cuDNN does not take: the token sees itself."""
    group = q.shape[1] // k.shape[1]
    scores = (q.float() * k.float().repeat_interleave(group, 1)).sum(-1) * spec.scale
    return v.repeat_interleave(group, 1), scores.transpose(0, 1)


class TorchVarlen:
    """FlashAttention 2 as it is built into torch: one launch for all documents."""

    name = "varlen"

    def refuses(self, job: Job, *, here: bool = True) -> str | None:
        head_dim, capability = job.head_dim, job.capability
        small = capability in ((8, 6), (8, 9), (12, 0), (12, 1))  # too little shared memory for wide heads
        return flash_refusal(job, oldest=(8, 0)) or refusal(
            (small and head_dim > 192, f"takes head dimensions up to 192 on this GPU {capability}, not {head_dim}"),
            (job.spec.softcap is not None, f"has no softcap (asked for {job.spec.softcap})"),
            (
                here and not torch.backends.cuda.is_flash_attention_available(),
                "this torch was built without FlashAttention",
            ),
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        shared = self._shared(documents_cu, lengths, spec)
        out, lse, *_ = aten._flash_attention_forward(q, k, v, return_debug_mask=False, **shared)
        return out.contiguous(), lse

    def backward(
        self, dout: Tensor, saved: Saved, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> Gradients:
        q, k, v, out, lse = saved
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # read by dropout only
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = aten._flash_attention_backward(
            dout, q, k, v, out, lse, rng_state=rng_state, unused=unused, **self._shared(documents_cu, lengths, spec)
        )
        return dq, dk, dv

    def _shared(self, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec) -> dict[str, Any]:
        """Arguments of the forward and of the backward pass."""
        return {
            "cum_seq_q": documents_cu,
            "cum_seq_k": documents_cu,
            "max_q": max(lengths),
            "max_k": max(lengths),
            "dropout_p": 0.0,
            "is_causal": True,
            "scale": spec.scale,
            "window_size_left": flash_window_left(spec, lengths),
            "window_size_right": 0,
        }


class WideHeads:
    """torch's memory-efficient attention (CUTLASS, for Ampere): what can do heads wider than 256 (Gemma 4's 512).

    The FlashAttentions end at 256, cuDNN in torch at 128, and scores cannot be added up over parts of a head after the
    softmax. Called for each key/value head too: its queries read one copy of it.
    """

    name = "mem-efficient"

    def refuses(self, job: Job, *, here: bool = True) -> str | None:
        dtype, head_dim, spec, capability = job.dtype, job.head_dim, job.spec, job.capability
        return refusal(
            (job.device_type != "cuda", f"runs on cuda, not on {job.device_type}"),
            (dtype not in (torch.bfloat16, torch.float16), f"takes bf16 and fp16, not {dtype}"),
            (
                capability is None or capability[0] not in (8, 9),
                f"is known to run on compute capabilities 8 and 9, this GPU has {capability}",
            ),
            (head_dim % 8 != 0, f"takes head dimensions in steps of 8, not {head_dim}"),
            (spec.window is not None, f"has no sliding window (asked for {spec.window})"),
            (spec.softcap is not None, f"has no softcap (asked for {spec.softcap})"),
            (spec.repeatable, NOT_REPEATABLE),
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        out = q.new_empty(q.shape)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        for tokens, kv, heads in _by_kv_head(q, k, lengths):
            one = _together(q[tokens, heads], k[tokens, kv], v[tokens, kv])
            part, sums, *_ = aten._efficient_attention_forward(
                *one, bias=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                dropout_p=0.0, custom_mask_type=CAUSAL, compute_log_sumexp=True, scale=spec.scale,
            )  # fmt: skip
            out[tokens, heads] = part[0]
            lse[heads, tokens] = sums[0, :, : part.shape[1]]
        return out, lse

    def backward(
        self, dout: Tensor, saved: Saved, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> Gradients:
        q, k, v, out, lse = saved
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        unread = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's seed and offset
        for tokens, kv, heads in _by_kv_head(q, k, lengths):
            length = tokens.stop - tokens.start
            one = _together(q[tokens, heads], k[tokens, kv], v[tokens, kv])
            sums = F.pad(lse[heads, tokens], (0, -length % LSE_ALIGNMENT), value=torch.inf)
            grads = aten._efficient_attention_backward(
                dout[None, tokens, heads].contiguous(), *one, bias=None, out=out[None, tokens, heads].contiguous(),
                cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=length, max_seqlen_k=length, logsumexp=sums[None],
                dropout_p=0.0, philox_seed=unread, philox_offset=unread, custom_mask_type=CAUSAL,
                bias_requires_grad=False, scale=spec.scale,
            )  # fmt: skip
            dq[tokens, heads] = grads[0][0]
            dk[tokens, kv], dv[tokens, kv] = (g[0].sum(1, dtype=torch.float32).to(k.dtype) for g in grads[1:3])
        return dq, dk, dv


def _by_kv_head(q: Tensor, k: Tensor, lengths: Sequence[int]) -> Iterator[tuple[slice, int, slice]]:
    """Each document's tokens, a key/value head, and the query heads that read it."""
    group = q.shape[1] // k.shape[1]
    for a, b in spans(lengths):
        for kv in range(k.shape[1]):
            yield slice(a, b), kv, slice(kv * group, (kv + 1) * group)


def _together(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [L, g, d]; k, v [L, d] -> [1, L, g, d], one key/value head seen g times. Copies, as strides are of 32 bits."""
    keys, values = (x.contiguous()[:, None].expand(-1, q.shape[1], -1) for x in (k, v))
    return q.contiguous()[None], keys[None], values[None]


class CpuKernel:
    """torch's flash attention for CPUs. It wants as many kv heads as query heads, so kv is repeated, per document."""

    name = "cpu"

    def refuses(self, job: Job, *, here: bool = True) -> str | None:
        dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        return refusal(
            (job.device_type != "cpu", f"runs on cpu, not on {job.device_type}"),
            (job.dtype not in dtypes, f"takes floating point, not {job.dtype}"),
            (job.spec.window is not None, f"has no sliding window (asked for {job.spec.window})"),
            (job.spec.softcap is not None, f"has no softcap (asked for {job.spec.softcap})"),
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        assert spec.softcap is None
        assert spec.window_for(lengths) is None
        out = q.new_empty(q.shape)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
        group = q.shape[1] // k.shape[1]
        for a, b in spans(lengths):
            keys, values = (_heads_first(x[a:b]).repeat_interleave(group, 1) for x in (k, v))
            out_one, lse_one = aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q[a:b]), keys, values, dropout_p=0.0, is_causal=True, scale=spec.scale
            )
            out[a:b], lse[:, a:b] = _tokens_first(out_one), lse_one[0]
        return out, lse

    def backward(
        self, dout: Tensor, saved: Saved, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> Gradients:
        q, k, v, out, lse = saved
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        for a, b in spans(lengths):
            keys, values = (_heads_first(x[a:b]).repeat_interleave(group, 1) for x in (k, v))
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_heads_first(x[a:b]) for x in (dout, q)), keys, values, _heads_first(out[a:b]),
                lse[:, a:b].transpose(0, 1).contiguous().transpose(0, 1)[None],  # the layout its forward returns
                dropout_p=0.0, is_causal=True, scale=spec.scale,
            )  # fmt: skip
            dq[a:b], dkeys, dvalues = (_tokens_first(grad) for grad in grads)
            dk[a:b] = dkeys.unflatten(1, (kv_heads, group)).sum(2)
            dv[a:b] = dvalues.unflatten(1, (kv_heads, group)).sum(2)
        return dq, dk, dv
