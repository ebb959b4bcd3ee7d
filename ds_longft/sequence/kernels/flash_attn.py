"""The installable kernels: flash-attn 4, 3 and 2. One launch for all documents of a pack.

They read q, k, v in place, whatever their strides. Their backward adds up dq with atomics, so gradients repeat to
rounding, not to the bit, unless flash-attn-4 is asked for a fixed order (`AttentionSpec.repeatable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_longft.batch import Documents
from ds_longft.sequence.kernels.base import UNREPEATABLE, Attended, AttentionSpec, Gradients, Job, Kernel, Saved, spans

REPEATABLE_QUERIES = 32768
"""Queries of a document at a time: their dq in float32 takes 16 MiB a head."""


class FlashAttention4(Kernel):
    """flash-attn-4 (`pip install flash-attn-4`): kernels built on first use for Hopper and Blackwell."""

    name, package = "flash-attn-4", "flash_attn.cute.interface"
    oldest = (9, 0)
    has_window = has_softcap = repeats = True

    def further_limits(self, job: Job) -> list[tuple[bool, str]]:
        head_dim, spec = job.head_dim, job.spec
        major = job.capability[0] if job.capability else 0
        return [
            (major not in (9, 10, 11), f"has no complete backward for compute capability {job.capability}"),
            (major > 9 and 128 < head_dim < 256, f"takes up to 128, or 256, on Blackwell, not {head_dim}"),
            (major > 9 and head_dim == 256 and spec.softcap is not None, "has no softcap at 256 on Blackwell"),
            (major > 9 and spec.repeatable, UNREPEATABLE),
        ]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec, sinks: Tensor | None = None
    ) -> Attended:
        """`Kernel.forward`, with one more key per head whose score is its sink and whose value is zero: sinks [hq]."""
        from flash_attn.cute.interface import _flash_attn_fwd

        asked = self._mask(documents.lengths, spec) | {"learnable_sink": None if sinks is None else sinks.float()}
        if len(documents.lengths) == 1:  # its dense schedule is the faster one
            out, lse, *_ = _flash_attn_fwd(q[None], k[None], v[None], return_lse=True, **asked)
            return out[0], lse[0]
        out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **_borders(documents), **asked)
        return out, lse

    def backward(
        self, dout: Tensor, saved: Saved, documents: Documents, spec: AttentionSpec, sinks: Tensor | None = None
    ) -> Any:
        """`Kernel.backward`; with sinks [hq] also their gradient, float32, in any order (not `repeatable`)."""
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, out, lse = saved
        if spec.repeatable and max(documents.lengths) > REPEATABLE_QUERIES:
            return self._in_parts(dout, saved, documents.lengths, spec)
        asked = self._mask(documents.lengths, spec) | {"learnable_sink": None if sinks is None else sinks.float()}
        if len(documents.lengths) == 1 and not spec.repeatable:
            one = (x[None] for x in (q, k, v, out, dout, lse))
            dq, dk, dv, *dsinks = _flash_attn_bwd(*one, **asked)
            return dq[0], dk[0], dv[0], *dsinks
        order = {"deterministic": spec.repeatable}
        return _flash_attn_bwd(q, k, v, out, dout, lse, **order, **_borders(documents), **asked)

    def _in_parts(self, dout: Tensor, saved: Saved, lengths: Sequence[int], spec: AttentionSpec) -> Gradients:
        """The repeatable backward of long documents: `REPEATABLE_QUERIES` at a time.

        A key block waits until the one before it has added its part. That is quick while the sums of dq stay in the
        L2 cache: on an H200, 16 query heads of 131,072 tokens, 309 ms in parts of 32,768 queries, 443 ms at once, and
        283 ms in any order.
        """
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, out, lse = saved
        dq = q.new_empty(q.shape)
        dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        for first, end in spans(lengths):
            mask = self._mask([end - first], spec)
            for a in range(first, end, REPEATABLE_QUERIES):
                b = min(a + REPEATABLE_QUERIES, end)
                # Masks are aligned to the last query and the last key: these queries see the keys up to their own.
                queries = [x[None, a:b] for x in (out, dout)]
                keys = [x[None, first:b] for x in (k, v)]
                sums = lse[None, :, a:b].contiguous()
                part = _flash_attn_bwd(q[None, a:b], *keys, *queries, sums, deterministic=True, **mask)
                dq[a:b] = part[0][0]
                dk[first:b] += part[1][0]
                dv[first:b] += part[2][0]
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _mask(self, lengths: Sequence[int], spec: AttentionSpec) -> dict[str, Any]:
        window = spec.window_for(lengths)
        return {
            "softmax_scale": spec.scale,
            "causal": True,
            "softcap": spec.softcap or 0.0,
            "window_size_left": None if window is None else window - 1,
            "window_size_right": None if window is None else 0,
        }


class FlashAttention3(Kernel):
    """flash-attn-3 (`flash_attn_interface`, built from the `hopper` folder of flash-attention)."""

    name, package = "flash-attn-3", "flash_attn_interface"
    oldest = (9, 0)
    has_window = has_softcap = True

    def further_limits(self, job: Job) -> list[tuple[bool, str]]:
        other = job.capability is not None and job.capability[0] != 9
        return [(other, f"is written for compute capability 9, this GPU has {job.capability}")]

    def missing(self) -> str | None:
        if reason := super().missing():
            return reason
        from flash_attn_interface import _flash_attn_forward

        if not isinstance(_flash_attn_forward, torch.library.CustomOpDef):
            return "is too old: its window is a pair there; build flash-attention's hopper folder of 2025-09 or later"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> Attended:
        from flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(q, k, v, causal=True, **_arguments(documents, spec))
        return out, lse

    def backward(self, dout: Tensor, saved: Saved, documents: Documents, spec: AttentionSpec) -> Gradients:
        from flash_attn_interface import _flash_attn_backward

        q, k, v, out, lse = saved
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        arguments = _arguments(documents, spec)
        _flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, is_causal=True, **arguments)
        return dq, dk, dv


class FlashAttention2(Kernel):
    """flash-attn 2 (`pip install flash-attn`, 2.8 or later)."""

    name, package = "flash-attn-2", "flash_attn.flash_attn_interface"  # flash-attn-4 has a `flash_attn` too
    has_window = has_softcap = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> Attended:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        arguments = _arguments(documents, spec)
        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, causal=True, dropout_p=0.0, **arguments)
        return out.contiguous(), lse

    def backward(self, dout: Tensor, saved: Saved, documents: Documents, spec: AttentionSpec) -> Gradients:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        q, k, v, out, lse = saved
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        _flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, causal=True, dropout_p=0.0, alibi_slopes=None,
            deterministic=False, **_arguments(documents, spec),
        )  # fmt: skip
        return dq, dk, dv


def _borders(documents: Documents) -> dict[str, Any]:
    """Where documents begin, for queries and keys alike."""
    both = {"cu_seqlens": documents.cu_seqlens, "max_seqlen": max(documents.lengths)}
    return {f"{name}_{of_what}": value for name, value in both.items() for of_what in "qk"}


def _arguments(documents: Documents, spec: AttentionSpec) -> dict[str, Any]:
    """What the forward and backward pass of flash-attn 2 and 3 share."""
    return {
        **_borders(documents),
        "softmax_scale": spec.scale,
        "window_size_left": spec.keys_to_the_left(documents.lengths),
        "window_size_right": 0,
        "softcap": spec.softcap or 0.0,
    }
