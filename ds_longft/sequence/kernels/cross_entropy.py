"""Weighted cross-entropy of rows of logits and its gradient, one Triton kernel: two reads and a write of the logits.

By torch's own operations bf16 logits are copied to float32 and back besides: 110 ms of a step with 65,536 targets and a
vocabulary of 128K on an H200, beside 180 ms of matrix products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # columns at a time
WARPS = 16


@triton.jit
def _rows(logits, targets, weights, losses, stride, vocab, gradient: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    weight = tl.load(weights + row).to(tl.float32)
    at_target = tl.load(logits + target).to(tl.float32)
    top, total = float("-inf"), 0.0
    for start in range(0, vocab, block):
        columns = start + tl.arange(0, block)
        x = tl.load(logits + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    lse = top + tl.log(total)
    tl.store(losses + row, (lse - at_target) * weight)
    if gradient:
        for start in range(0, vocab, block):
            columns = start + tl.arange(0, block)
            x = tl.load(logits + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
            share = tl.exp(x - lse) - tl.where(columns == target, 1.0, 0.0)
            tl.store(logits + columns, share * weight, mask=columns < vocab)


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, *, gradient: bool = True) -> Tensor:
    """weights * cross_entropy(logits, targets): logits [rows, V], targets and weights [rows] -> [rows] float32.

    With `gradient` the logits are overwritten by the gradient of the sum of the result.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _rows[(rows,)](
            logits, targets, weights, losses, logits.stride(0), vocab, gradient=gradient, block=BLOCK, num_warps=WARPS
        )
    return losses
