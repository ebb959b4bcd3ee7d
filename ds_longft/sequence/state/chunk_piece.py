"""Which code runs the piece of flash-linear-attention's backward pass that Triton 3.4 to 3.7.0 breaks on Hopper.

FLA refuses there (its issue 640), and so would every layer with a decay for each head: gated delta rule, Mamba-2,
lightning attention. It has a registry of other implementations for such pieces; ours goes in as the last of them, after
TileLang's, which needs nvcc and does not take the float32 states of Mamba-2: a kernel that avoids what breaks
(`chunk_kernel.py`), in half precision, with a Triton that it was tested with and where it agrees with torch's products,
else these (`chunk_backward.py`). torch 2.13 comes with Triton 3.7.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ds_longft.sequence.state.chunk_backward import Gradients, Handed, chunk_backward, chunks_of
from ds_longft.sequence.state.spread import CHUNK_TOKENS

TESTED_WITH = frozenset({"3.6.0"})
"""Versions of Triton with which `tests/gpu/test_states.py` passed on an H100 or H200, in half precision. In float32 it
failed once, beside seven other processes on the GPU, and passed alone: torch's products run."""


def fla_refuses() -> bool:
    """Whether FLA's own kernel would refuse on this machine."""
    from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0, TRITON_ABOVE_3_7_1

    return bool(IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not TRITON_ABOVE_3_7_1)


@cache
def register_where_needed() -> bool:
    """Hand `backward_piece` to FLA where it would refuse; returns whether. Again, it does nothing."""
    if not fla_refuses():
        return False
    from fla.backends import BaseBackend, register

    class Ours(BaseBackend):
        backend_type = "ds_longft"
        priority = 9  # the lowest runs first, others have 5

        def chunk_bwd_dqkwg_verifier(self, q: Tensor, *_: Any, **given: Any) -> tuple[bool, str | None]:
            packed = len(q) == 1  # FLA packs documents in one row
            ours = given.get("g") is not None and packed and not given.get("state_v_first")
            return ours, None if ours else "only one row of documents, with a decay for each head"

        chunk_bwd_dqkwg = staticmethod(backward_piece)

    register("common")(Ours)
    return True


def backward_piece(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, h: Tensor, dh: Tensor, *, g: Tensor, cu_seqlens: Tensor | None = None,
    w: Tensor | None = None, dv: Tensor | None = None, scale: float = 1.0, chunk_size: int = CHUNK_TOKENS,
    chunk_indices: Tensor | None = None, **_: Any,
) -> Gradients:  # fmt: skip
    """FLA's `chunk_bwd_dqkwg`. Without `cu_seqlens` the row is one document."""
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, q.shape[1]], device=q.device)
    chunks = chunks_of(cu_seqlens, chunk_size) if chunk_indices is None else chunk_indices
    handed = Handed(q, k, v, do, h, dh, w, dv, g, scale, cu_seqlens, chunk_size, chunks)
    if is_tested(q.dtype):
        from ds_longft.sequence.state import chunk_kernel

        shape = chunk_kernel.Shape(q.shape[3], v.shape[3], q.dtype, h.dtype, w is not None, chunk_size)
        if chunk_kernel.agrees(shape, q.device):
            return chunk_kernel.chunk_backward(handed)
    return chunk_backward(handed)


def is_tested(dtype: torch.dtype) -> bool:
    """Whether the kernel was tested with this Triton, in half precision."""
    if dtype.itemsize != 2:
        return False
    import triton

    return triton.__version__ in TESTED_WITH


def piece_in_words(heads: Iterable[tuple[str, int, int]], dtype: torch.dtype, device: torch.device) -> str:
    """What runs it, for the line that a run starts with. `heads`: "delta" or "decay", K, V.

    The kernel is tried for it, some seconds of compiling that the first step would need.
    """
    if not is_tested(dtype):
        return "a piece of its backward pass in torch (Triton before 3.7.1 fails on Hopper)"
    from ds_longft.sequence.state.chunk_kernel import Shape, agrees

    states = {"delta": dtype, "decay": torch.float32}
    if all(agrees(Shape(keys, values, dtype, states[kind], kind == "delta"), device) for kind, keys, values in heads):
        return "a piece of its backward pass in a kernel of ours (Triton before 3.7.1 fails on Hopper)"
    return "a piece of its backward pass in torch, slower (Triton before 3.7.1 fails on Hopper, here our kernel too)"
