"""Our Triton kernel of a piece of a backward pass, in Triton's interpreter: the largest error of each case, as JSON.

A process of its own: Triton reads TRITON_INTERPRET when it is imported. The interpreter multiplies bfloat16 wrongly, so
half precision is float16 here.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from ds_longft.sequence.state import chunk_backward, chunk_kernel
from ds_longft.sequence.state.chunk_kernel import Shape

LENGTHS = (70, 1, 3, 64, 200)
SINGLE, HALF = torch.float32, torch.float16
CASES = {
    "gated deltas, heads in twos": (3, 6, Shape(64, 32, SINGLE, SINGLE, True), 1 << 17),
    "the same, two chunks at a time": (3, 6, Shape(64, 32, SINGLE, SINGLE, True), 2 * 6 * 64),
    "a head each, features in two blocks": (2, 2, Shape(128, 128, SINGLE, SINGLE, True), 1 << 17),
    "Mamba-2, features that fill no block, short chunks": (1, 4, Shape(96, 80, SINGLE, SINGLE, False, 32), 1 << 17),
    "half precision, states in float32": (2, 2, Shape(128, 64, HALF, SINGLE, False), 1 << 17),
}


def error_of(groups: int, heads: int, shape: Shape, rows_at_a_time: int) -> float:
    """Against torch's products in float32, relative by norm."""
    torch.manual_seed(0)
    tokens, keys, values, dtype = sum(LENGTHS), shape.keys, shape.values, shape.dtype
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    chunks = chunk_backward.chunks_of(cu_seqlens, shape.chunk_tokens)
    q, k = (torch.randn(1, tokens, groups, keys).to(dtype) for _ in range(2))
    v, do, dv = (torch.randn(1, tokens, heads, values).to(dtype) for _ in range(3))
    h, dh = (torch.randn(1, len(chunks), heads, keys, values).to(shape.of_states) for _ in range(2))
    w = torch.randn(1, tokens, heads, keys).to(dtype) if shape.has_w else None
    g = -torch.rand(1, tokens, heads)
    rest = (g, dv, keys**-0.5, cu_seqlens, shape.chunk_tokens, chunks)
    chunk_kernel.ROWS_AT_A_TIME = rows_at_a_time
    ours = chunk_kernel.chunk_backward(q, k, v, do, h, dh, w, *rest)

    def single(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float()

    given = [single(t) for t in (q, k, v, do, h, dh, w, g, dv)]
    wanted = chunk_backward.chunk_backward(*given, *rest[2:])
    both = [(a.float(), b) for a, b in zip(ours, wanted, strict=True) if a is not None and b is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in both)


if __name__ == "__main__":
    print(json.dumps({name: error_of(*case) for name, case in CASES.items()}))
