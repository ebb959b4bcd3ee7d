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

from ds_longft.batch import Documents
from ds_longft.sequence.kernels.base import Attended, AttentionSpec, Gradients, Job, Kernel, PerDocument, Saved, spans
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


class CudnnKernel(PerDocument):
    """cuDNN's fused attention, in every CUDA build of torch; grouped kv heads natively.

    Fast on long documents. cuDNN plans each document length it has not seen before, which is why many documents of
    ever new lengths belong to a varlen kernel (see `table.CUDNN_MIN_WORK`). It takes no document of one token.
    """

    name = "cudnn"
    widest_head = 128

    def missing(self) -> str | None:
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        return f"needs cuDNN 9 in torch, found {version}" if version is None or version < 90000 else None

    def forward_one(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Attended:
        if len(q) == 1:  # the token sees itself
            group = q.shape[1] // k.shape[1]
            scores = (q.float() * k.float().repeat_interleave(group, 1)).sum(-1) * spec.scale
            return v.repeat_interleave(group, 1), scores.transpose(0, 1)
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *map(_heads_first, (q, k, v)), attn_bias=None, compute_log_sumexp=True, dropout_p=0.0, is_causal=True,
            return_debug_mask=False, scale=spec.scale,
        )  # fmt: skip
        return _tokens_first(out).contiguous(), lse.reshape(q.shape[1], q.shape[0])

    def backward_one(self, dout: Tensor, saved: Saved, spec: AttentionSpec) -> Gradients:
        q, k, v, out, lse = saved
        if len(q) == 1:  # by lse, so that it is right beside attention sinks too
            return MathKernel().backward_one(dout, saved, spec)
        seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))  # read by dropout only
        # torch caches cuDNN's plans by the strides of q, k, v only: the others must come in one layout every time.
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *map(_heads_first, (dout.contiguous(), q, k, v, out.contiguous())), lse.contiguous()[None, :, :, None],
            philox_seed=seed, philox_offset=offset, attn_bias=None, cum_seq_q=None, cum_seq_k=None, max_q=len(q),
            max_k=len(q), dropout_p=0.0, is_causal=True, scale=spec.scale,
        )  # fmt: skip
        dq, dk, dv = (_tokens_first(grad) for grad in grads)
        return dq, dk, dv


class TorchVarlen(Kernel):
    """FlashAttention 2 as it is built into torch: one launch for all documents."""

    name = "varlen"
    has_window = repeats = True

    def further_limits(self, job: Job) -> list[tuple[bool, str]]:
        small = job.capability in ((8, 6), (8, 9), (12, 0), (12, 1))  # too little shared memory for wide heads
        wide = f"takes head dimensions up to 192 on this GPU {job.capability}, not {job.head_dim}"
        return [(small and job.head_dim > 192, wide)]

    def missing(self) -> str | None:
        found = torch.backends.cuda.is_flash_attention_available()
        return None if found else "this torch was built without FlashAttention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> Attended:
        shared = self._shared(documents, spec)
        out, lse, *_ = aten._flash_attention_forward(q, k, v, return_debug_mask=False, **shared)
        return out.contiguous(), lse

    def backward(self, dout: Tensor, saved: Saved, documents: Documents, spec: AttentionSpec) -> Gradients:
        q, k, v, out, lse = saved
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # read by dropout only
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = aten._flash_attention_backward(
            dout, q, k, v, out, lse, rng_state=rng_state, unused=unused, **self._shared(documents, spec)
        )
        return dq, dk, dv

    def _shared(self, documents: Documents, spec: AttentionSpec) -> dict[str, Any]:
        """Arguments of the forward and of the backward pass."""
        longest = max(documents.lengths)
        return {
            "cum_seq_q": documents.cu_seqlens,
            "cum_seq_k": documents.cu_seqlens,
            "max_q": longest,
            "max_k": longest,
            "dropout_p": 0.0,
            "is_causal": True,
            "scale": spec.scale,
            "window_size_left": spec.keys_to_the_left(documents.lengths),
            "window_size_right": 0,
        }


class WideHeads(Kernel):
    """torch's memory-efficient attention (CUTLASS, for Ampere): what can do heads wider than 256 (Gemma 4's 512).

    The FlashAttentions end at 256, cuDNN in torch at 128, and scores cannot be added up over parts of a head after the
    softmax. Called for each key/value head too: its queries read one copy of it.
    """

    name = "mem-efficient"
    widest_head = None

    def further_limits(self, job: Job) -> list[tuple[bool, str]]:
        known = job.capability is not None and job.capability[0] in (8, 9)
        return [(not known, f"is known to run on compute capabilities 8 and 9, this GPU has {job.capability}")]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> Attended:
        out = q.new_empty(q.shape)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        for tokens, kv, heads in _by_kv_head(q, k, documents.lengths):
            one = _together(q[tokens, heads], k[tokens, kv], v[tokens, kv])
            part, sums, *_ = aten._efficient_attention_forward(
                *one, bias=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                dropout_p=0.0, custom_mask_type=CAUSAL, compute_log_sumexp=True, scale=spec.scale,
            )  # fmt: skip
            out[tokens, heads] = part[0]
            lse[heads, tokens] = sums[0, :, : part.shape[1]]
        return out, lse

    def backward(self, dout: Tensor, saved: Saved, documents: Documents, spec: AttentionSpec) -> Gradients:
        q, k, v, out, lse = saved
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        unread = torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's seed and offset
        for tokens, kv, heads in _by_kv_head(q, k, documents.lengths):
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


class CpuKernel(PerDocument):
    """torch's flash attention for CPUs. It wants as many kv heads as query heads, so kv is repeated, per document."""

    name, device_type = "cpu", "cpu"
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    repeats = True

    def forward_one(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Attended:
        keys, values = (_heads_first(x).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q), keys, values, dropout_p=0.0, is_causal=True, scale=spec.scale
        )
        return _tokens_first(out).contiguous(), lse[0]

    def backward_one(self, dout: Tensor, saved: Saved, spec: AttentionSpec) -> Gradients:
        q, k, v, out, lse = saved
        kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
        keys, values = (_heads_first(x).repeat_interleave(group, 1) for x in (k, v))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads_first(x) for x in (dout, q)), keys, values, _heads_first(out),
            lse.transpose(0, 1).contiguous().transpose(0, 1)[None],  # the layout its forward returns
            dropout_p=0.0, is_causal=True, scale=spec.scale,
        )  # fmt: skip
        dq, dk, dv = (_tokens_first(grad) for grad in grads)
        return dq, *(grad.unflatten(1, (kv_heads, group)).sum(2) for grad in (dk, dv))
