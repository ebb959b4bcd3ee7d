"""Our Triton kernel of a piece of a backward pass, in Triton's interpreter: the largest error of each case, as JSON.

A process of its own: Triton reads TRITON_INTERPRET when it is imported. The interpreter multiplies bfloat16 wrongly, so
half precision is float16 here.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from ds_longft.sequence.state import chunk_kernel
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
    """The largest of its gradients; NaN where one is."""
    chunk_kernel.ROWS_AT_A_TIME = rows_at_a_time
    handed = chunk_kernel.random_piece(shape, LENGTHS, groups, heads, torch.device("cpu"))
    return float(torch.tensor(chunk_kernel.errors(handed)).max())


if __name__ == "__main__":
    print(json.dumps({name: error_of(*case) for name, case in CASES.items()}))
