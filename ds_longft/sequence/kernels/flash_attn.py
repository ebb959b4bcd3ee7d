"""The installable kernels: flash-attn 4, 3 and 2. One launch for all documents of a pack.

They read q, k, v in place, whatever their strides. Their backward adds up dq with atomics, so gradients repeat to
rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_longft.sequence.kernels.base import (
    AttentionSpec,
    Capability,
    flash_refusal,
    flash_window_left,
    import_failure,
    refusal,
)


class FlashAttention4:
    """flash-attn-4 (`pip install flash-attn-4`): kernels built on first use for Hopper and Blackwell."""

    name = "flash-attn-4"

    def refuses(
        self,
        *,
        device_type: str,
        dtype: torch.dtype,
        head_dim: int,
        spec: AttentionSpec,
        capability: Capability | None,
        here: bool = True,
    ) -> str | None:
        """See `Kernel.refuses`."""
        major = capability[0] if capability else 0
        return (
            flash_refusal(device_type, dtype, head_dim, capability, oldest=(9, 0))
            or refusal(
                (major not in (9, 10, 11), f"has no complete backward for compute capability {capability}"),
                (major > 9 and 128 < head_dim < 256, f"takes up to 128, or 256, on Blackwell, not {head_dim}"),
                (major > 9 and head_dim == 256 and spec.softcap is not None, "has no softcap at 256 on Blackwell"),
            )
            or (import_failure("flash_attn.cute.interface") if here else None)
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        from flash_attn.cute.interface import _flash_attn_fwd

        if len(lengths) == 1:  # its dense schedule is the faster one
            out, lse, *_ = _flash_attn_fwd(q[None], k[None], v[None], return_lse=True, **self._mask(lengths, spec))
            return out[0], lse[0]
        out, lse, *_ = _flash_attn_fwd(
            q, k, v, return_lse=True, **self._borders(documents_cu, lengths), **self._mask(lengths, spec)
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents_cu: Tensor,
        lengths: Sequence[int],
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        from flash_attn.cute.interface import _flash_attn_bwd

        if len(lengths) == 1:
            one = (x[None] for x in (q, k, v, out, dout, lse))
            dq, dk, dv = _flash_attn_bwd(*one, **self._mask(lengths, spec))
            return dq[0], dk[0], dv[0]
        borders = self._borders(documents_cu, lengths)
        dq, dk, dv = _flash_attn_bwd(q, k, v, out, dout, lse, **borders, **self._mask(lengths, spec))
        return dq, dk, dv

    def _mask(self, lengths: Sequence[int], spec: AttentionSpec) -> dict[str, float | int | bool | None]:
        window = spec.window_for(lengths)
        return {
            "softmax_scale": spec.scale,
            "causal": True,
            "softcap": spec.softcap or 0.0,
            "window_size_left": None if window is None else window - 1,
            "window_size_right": None if window is None else 0,
        }

    def _borders(self, documents_cu: Tensor, lengths: Sequence[int]) -> dict[str, Tensor | int]:
        longest = max(lengths)
        return {
            "cu_seqlens_q": documents_cu,
            "cu_seqlens_k": documents_cu,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }


class FlashAttention3:
    """flash-attn-3 (`flash_attn_interface`, built from the `hopper` folder of flash-attention)."""

    name = "flash-attn-3"

    def refuses(
        self,
        *,
        device_type: str,
        dtype: torch.dtype,
        head_dim: int,
        spec: AttentionSpec,
        capability: Capability | None,
        here: bool = True,
    ) -> str | None:
        """See `Kernel.refuses`."""
        reason = flash_refusal(device_type, dtype, head_dim, capability, oldest=(9, 0))
        if reason is None and capability is not None and capability[0] != 9:
            reason = f"is written for compute capability 9, this GPU has {capability}"
        if not here:
            return reason
        if reason := reason or import_failure("flash_attn_interface"):
            return reason
        from flash_attn_interface import _flash_attn_forward

        if not isinstance(_flash_attn_forward, torch.library.CustomOpDef):
            return "is too old: its window is a pair there; build flash-attention's hopper folder of 2025-09 or later"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        from flash_attn_interface import _flash_attn_forward

        longest = max(lengths)
        out, lse, *_ = _flash_attn_forward(
            q,
            k,
            v,
            cu_seqlens_q=documents_cu,
            cu_seqlens_k=documents_cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=spec.scale,
            causal=True,
            window_size_left=flash_window_left(spec, lengths),
            window_size_right=0,
            softcap=spec.softcap or 0.0,
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents_cu: Tensor,
        lengths: Sequence[int],
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        from flash_attn_interface import _flash_attn_backward

        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        longest = max(lengths)
        _flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens_q=documents_cu,
            cu_seqlens_k=documents_cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=spec.scale,
            is_causal=True,
            window_size_left=flash_window_left(spec, lengths),
            window_size_right=0,
            softcap=spec.softcap or 0.0,
        )
        return dq, dk, dv


class FlashAttention2:
    """flash-attn 2 (`pip install flash-attn`, 2.8 or later)."""

    name = "flash-attn-2"

    def refuses(
        self,
        *,
        device_type: str,
        dtype: torch.dtype,
        head_dim: int,
        spec: AttentionSpec,
        capability: Capability | None,
        here: bool = True,
    ) -> str | None:
        """See `Kernel.refuses`."""
        return (
            flash_refusal(device_type, dtype, head_dim, capability, oldest=(8, 0))
            # flash-attn-4 shares the package name `flash_attn`: ask for the module itself
            or (import_failure("flash_attn.flash_attn_interface") if here else None)
        )

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        """See `Kernel.forward`."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        longest = max(lengths)
        out, lse, *_ = _flash_attn_varlen_forward(
            q,
            k,
            v,
            cu_seqlens_q=documents_cu,
            cu_seqlens_k=documents_cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            dropout_p=0.0,
            softmax_scale=spec.scale,
            causal=True,
            window_size_left=flash_window_left(spec, lengths),
            window_size_right=0,
            softcap=spec.softcap or 0.0,
        )
        return out.contiguous(), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        documents_cu: Tensor,
        lengths: Sequence[int],
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel.backward`."""
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        longest = max(lengths)
        _flash_attn_varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq=dq,
            dk=dk,
            dv=dv,
            cu_seqlens_q=documents_cu,
            cu_seqlens_k=documents_cu,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            dropout_p=0.0,
            softmax_scale=spec.scale,
            causal=True,
            window_size_left=flash_window_left(spec, lengths),
            window_size_right=0,
            softcap=spec.softcap or 0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return dq, dk, dv
