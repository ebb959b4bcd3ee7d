"""Work on some rows at a time, and the gradients of weights that all of them read: summed in at least float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def tiles_of(rows: int, tile_rows: int) -> list[slice]:
    """`tile_rows` rows each, the last one the rest."""
    return [slice(a, min(a + tile_rows, rows)) for a in range(0, rows, tile_rows)]


def add_tile(sums: list[Tensor | None], grads: Sequence[Tensor | None], start: int) -> None:
    """Add a tile's gradients, in at least float32."""
    for i, grad in enumerate(grads, start):
        if grad is not None:
            total = sums[i]
            sums[i] = wide(grad) if total is None else total.add_(wide(grad))


def rounded(sums: Sequence[Tensor | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The sums over all tiles in the weights' types."""
    pairs = zip(sums, tensors, strict=True)
    return [None if total is None or t is None else total.to(t.dtype) for total, t in pairs]
