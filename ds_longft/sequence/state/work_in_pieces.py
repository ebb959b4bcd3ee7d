"""Work of a layer with a state in pieces, some heads or some tokens at a time, and again in the backward pass.

Only what the work is given is kept, and its gradients are written over it where nothing else reads it. What the work
makes in between is several times as large: a gated norm in float32 takes 56 KiB a token of a Qwen3.5-like 8B, a gated
delta rule and its convolution 100, where their inputs and outputs take 32. A piece has a share of that.

Letters: s tokens of this rank, S of the pack, C channels of the model, c of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_longft.sequence.exchange import Buffers, Ranges, heads_into, tokens_to_heads
from ds_longft.sequence.reuse import ours_alone
from ds_longft.sequence.tiles import add_tile, rounded, tiles_of

TILE_TOKENS = 8192
"""Tokens that a norm with its gate works on at a time, where a rank has more."""


@dataclass(frozen=True)
class Rows:
    """Some tokens of this rank."""

    rows: slice

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[s, C] -> [tile, C]."""
        return [t[self.rows] for t in tensors]

    def put(self, totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """[tile, C] -> [s, C]."""
        for total, part in zip(totals, parts, strict=True):
            total[self.rows] = part


@dataclass(frozen=True)
class Columns:
    """Some heads of all tokens of the pack: taken from all ranks, and put back there."""

    widths: Sequence[Sequence[int]]  # parts of each tensor, side by side
    ranges: Ranges  # of each rank, the channels of each part
    group: ProcessGroup | None
    summed: Sequence[bool]  # of each part: other ranks or pieces have some of the channels too

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[s, C] -> [S, c] of each part."""
        dealt = tokens_to_heads([t.unsqueeze(-1) for t in split(tensors, self.widths)], self.ranges, self.group)
        return [t.squeeze(-1) for t in dealt]

    def put(self, totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """[S, c] of each part -> [s, C]: written, or added where several pieces have the same place."""
        places = [t.unsqueeze(-1) for t in split(totals, self.widths)]
        heads_into(places, [t.unsqueeze(-1) for t in parts], self.ranges, self.group, Buffers(), self.summed)


@dataclass(frozen=True)
class Piece:
    """One part of the work."""

    work: Callable[..., Tensor]  # of the parts of what is given
    inputs: Rows | Columns  # where they lie in tensors [s, C]
    output: Rows | Columns


def split(tensors: Sequence[Tensor], widths: Sequence[Sequence[int]]) -> list[Tensor]:
    """The parts [s, C] of each tensor, side by side in it."""
    return [part for t, of in zip(tensors, widths, strict=True) for part in t.split(list(of), 1)]


def by_tiles(work: Callable[..., Tensor], weights: Sequence[Tensor], *given: Tensor) -> Tensor:
    """`work` of tensors [s, C], token by token, that reads `weights`. Returns [s, C]."""
    tokens = len(given[0])
    if tokens <= TILE_TOKENS:
        return work(*given)
    rows = map(Rows, tiles_of(tokens, TILE_TOKENS))
    return in_pieces([Piece(work, each, each) for each in rows], given[0].shape[1], weights, given)


def in_pieces(
    pieces: list[Piece], channels: int, weights: Sequence[Tensor], given: Sequence[Tensor], summed: Sequence[bool] = ()
) -> Tensor:
    """The work of all pieces -> [s, `channels`]. `weights`: what it reads beside the `given` tensors [s, C]. `summed`:
    of each of those whether several pieces read the same of it.
    """
    trained = [w for w in weights if w.requires_grad]
    flags = summed or [False] * len(given)
    return _InPieces.apply(pieces, channels, flags, trained, *given, *trained)


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: list[Piece], channels: int, summed: Sequence[bool], weights: list[Tensor], *tensors: Tensor
    ) -> Tensor:
        given = tensors[: len(summed)]
        out: Tensor | None = None
        for piece in pieces:
            part = piece.work(*piece.inputs.take(given))
            if out is None:
                out = part.new_empty(len(given[0]), channels)
            piece.output.put([out], [part])
            del part
        ctx.save_for_backward(*(t.detach() for t in given))  # see `ours_alone`
        # The weights themselves: ZeRO-3 has gathered them again when the backward pass comes.
        ctx.pieces, ctx.summed, ctx.weights = pieces, summed, weights
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        given, weights = ctx.saved_tensors, ctx.weights
        totals = [_total(t, several) for t, several in zip(given, ctx.summed, strict=True)]
        sums: list[Tensor | None] = [None] * len(weights)
        for piece in ctx.pieces:
            # copies, so that what was received can go, and convolutions need none of their own
            leaves = [part.contiguous().detach().requires_grad_() for part in piece.inputs.take(given)]
            with torch.enable_grad():
                out = piece.work(*leaves)
            (dpart,) = piece.output.take([dout])
            grads = torch.autograd.grad(out, [*leaves, *weights], dpart, allow_unused=True)
            del out, dpart
            parts = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=False)]
            piece.inputs.put(totals, parts)
            add_tile(sums, grads[len(leaves) :], 0)
            del grads, leaves, parts
        dgiven = (d.to(t.dtype) for d, t in zip(totals, given, strict=True))
        return None, None, None, None, *dgiven, *rounded(sums, weights)


def _total(given: Tensor, summed: bool) -> Tensor:
    """Where the gradient of a tensor is put together."""
    if summed:
        return torch.zeros_like(given, dtype=torch.promote_types(given.dtype, torch.float32))
    return given if ours_alone(given) else torch.empty_like(given, memory_format=torch.contiguous_format)
