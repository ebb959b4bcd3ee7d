"""How the tokens of a pack lie on ranks, and what layers with a state need of the other ranks.

A recurrence is per head, or per channel: tokens are exchanged for heads as for attention, it then runs over whole
documents, and comes back. Here everything is differentiable by itself: forward one all-to-all, backward the opposite.
Where channels are mixed before they could be dealt, a causal convolution reads the last tokens of the ranks before.

Letters: s tokens of this rank, S of the pack, C channels of the model, c of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ds_longft.batch import Documents
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.exchange import HeadShare, Ranges, deal_heads, heads_to_tokens, share_of, tokens_to_heads
from ds_longft.sequence.state.carried import Carried
from ds_longft.sequence.state.work_in_pieces import Columns, Piece, in_pieces, split

STATE_BYTES = 4 << 30
"""States of all chunks, counted in float32, of the heads that are worked on at a time; the backward pass has as many
gradients. Few heads would not fill a GPU: gated deltas of 32 heads (128 x 128) take one turn up to 131,072 tokens,
Mamba-2's 128 (128 x 64) two."""

FEW_STATE_BYTES = 1 << 30
"""The same where attention has its heads in turns too: memory is short (`train.attention_kv_heads_at_a_time`)."""

CHUNK_TOKENS = 64
"""Tokens that are worked on as one matrix, with a state before them."""

SCAN_COPIES = 8 * CHUNK_TOKENS
"""What a chunk of one of Mamba-1's channels counts as: float32 copies of what its scan reads and makes."""


@dataclass(frozen=True)
class Heads:
    """How channels belong to a layer's heads."""

    count: int
    groups: int  # of heads that read the same keys, or B and C
    reads: Callable[[HeadShare], tuple[range, ...]]  # the channels of each part that a share of the heads reads
    out: int  # channels of one head's output
    state: int  # elements of one head's state


def turns_of(tokens: int, heads: int, sp: int, state_elements: int, few: bool) -> int:
    """In how many turns each rank works on its heads: such that the states of one take `STATE_BYTES`, of `few` less."""
    states = 4 * state_elements * -(-tokens // CHUNK_TOKENS) * -(-heads // sp)
    return min(heads // sp, -(-states // (FEW_STATE_BYTES if few else STATE_BYTES)))


def _turn(share: HeadShare, i: int, count: int, group: int) -> HeadShare:
    """Part i of `count` of a rank's heads; whole groups where there are as many."""
    whole = not share.q.start % group and not len(share.q) % group and len(share.q) >= count * group
    unit = group if whole else 1
    units = len(share.q) // unit
    first, last = (share.q.start + unit * (n * units // count) for n in (i, i + 1))
    return share_of(range(first, last), group)


def _overlap(ranges: Sequence[range]) -> bool:
    """Whether some channel is in two of them."""
    return sum(map(len, ranges)) > max(r.stop for r in ranges) - min(r.start for r in ranges)


def by_width(heads: range, width: int) -> range:
    """The channels of these heads."""
    return range(heads.start * width, heads.stop * width)


def weights_of(layer: nn.Module) -> list[nn.Parameter]:
    """What a mixer's forward reads of itself, and of modules that it does not call."""
    inner = [child for child in layer.children() if isinstance(child, nn.Conv1d)]
    inner += [getattr(layer, name) for name in ("forget_gate", "dt_proj") if hasattr(layer, name)]
    return [weight for module in (layer, *inner) for weight in module.parameters(recurse=False)]


@dataclass(frozen=True)
class Spread:
    """The documents that a layer works on, and the ranks that hold their tokens."""

    documents: Documents
    sp: int
    rank: int  # in the sp group
    group: ProcessGroup | None
    carried: Carried | None = None  # where answers are made
    few: bool = False  # heads at a time, to save memory

    @classmethod
    def of(
        cls, documents: Documents, layout: ParallelLayout, carried: Carried | None = None, few: bool = False
    ) -> Spread:
        """The whole pack over the sp group; where each rank holds whole documents, these on this rank alone."""
        if documents.own is not None:
            assert carried is None, "answers are made of texts that lie on all ranks"
            return cls(documents.own, 1, 0, None, few=few)
        return cls(documents, layout.sp, layout.sp_rank, layout.group, carried, few)

    def by_heads(
        self,
        layer: nn.Module,
        heads: Heads,
        work: Callable[..., Tensor],
        tensors: Sequence[Tensor],
        widths: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """`work(share, *parts)` on whole documents with the heads of this rank: [S, c] of each part -> [S, h V].

        All of them at once, or some at a time (`turns_of`): then nothing of the work is kept. `tensors` [s, C]: parts
        side by side, of these `widths`; left out, each is one part. `heads`: what of the parts belongs to which head.
        The layer's parameters are what the work reads beside the parts. Returns [s, H V].
        Raises ModelError: more ranks than heads.
        """
        if self.sp > heads.count:
            raise ModelError(
                f"sp is {self.sp}, but {type(layer).__name__} has {heads.count} heads: sp can be at most that"
            )
        widths = widths or [(t.shape[1],) for t in tensors]
        shares = deal_heads(heads.count, heads.groups, self.sp)
        count = turns_of(sum(self.documents.lengths), heads.count, self.sp, heads.state, self.few)
        if self.carried is not None:  # it keeps the states of all heads at once
            count = 1
        if count == 1:
            out = work(shares[self.rank], *self.to_heads(split(tensors, widths), [heads.reads(r) for r in shares]))
            return self.to_tokens(out, [by_width(r.q, heads.out) for r in shares])
        turns = [[_turn(r, i, count, heads.count // heads.groups) for r in shares] for i in range(count)]
        reads = [[heads.reads(r) for r in turn] for turn in turns]
        shared = [_overlap(part) for part in zip(*(ranges for turn in reads for ranges in turn), strict=True)]
        channels = heads.count * heads.out
        pieces = [
            Piece(
                partial(work, turn[self.rank]),
                Columns(widths, ranges, self.group, shared),
                Columns([[channels]], [[by_width(r.q, heads.out)] for r in turn], self.group, [False]),
            )
            for turn, ranges in zip(turns, reads, strict=True)
        ]
        of_parts = iter(shared)
        flags = [any(list(islice(of_parts, len(of)))) for of in widths]
        return in_pieces(pieces, channels, weights_of(layer), tensors, flags)

    def to_heads(self, tensors: Sequence[Tensor], ranges: Ranges) -> tuple[Tensor, ...]:
        """[s, C] each -> [S, c] each; `ranges`: the channels of each tensor that each rank works on."""
        if self.group is None:
            return tuple(tensors)
        return _ToHeads.apply(self.group, ranges, *tensors)

    def to_tokens(self, tensor: Tensor, ranges: Sequence[range]) -> Tensor:
        """[S, c] -> [s, C]; `ranges`: the channels of each rank, without gap or overlap."""
        if self.group is None:
            return tensor
        return _ToTokens.apply(self.group, ranges, tensor)

    def with_halo(self, x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """x [s, C] -> [h + s, C] with the `tokens` tokens before it, fewer at the pack's start; their positions.

        A rank may hold fewer tokens than that: then they come of several ranks.
        """
        positions = self.documents.positions
        if self.group is None:
            return x, positions
        start = self.rank * len(x)
        halo: Tensor = _Halo.apply(x, tokens, self)
        return torch.cat([halo, x]), positions[start - len(halo) : start + len(x)]


class NextTokens(Spread):
    """One more token of each text, the same on every rank; `documents` are those that were read."""

    def to_heads(self, tensors: Sequence[Tensor], ranges: Ranges) -> tuple[Tensor, ...]:
        """[B, C] each -> [B, c] each."""
        return tuple(t[:, r.start : r.stop] for t, r in zip(tensors, ranges[self.rank], strict=True))

    def to_tokens(self, tensor: Tensor, ranges: Sequence[range]) -> Tensor:
        """[B, c] -> [B, C]."""
        if self.group is None:
            return tensor
        whole = tensor.new_zeros(len(tensor), ranges[-1].stop)
        whole[:, ranges[self.rank].start : ranges[self.rank].stop] = tensor
        dist.all_reduce(whole, group=self.group)
        return whole


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, ranges: Ranges, *tensors: Tensor) -> Any:
        ctx.group, ctx.ranges, ctx.rows = group, ranges, len(tensors[0]) * len(ranges)
        dealt = tokens_to_heads([t.unsqueeze(-1) for t in tensors], ranges, group)
        return tuple(t.squeeze(-1) for t in dealt)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back = heads_to_tokens([g.unsqueeze(-1) for g in grads], ctx.ranges, ctx.group)
        return None, None, *(t.squeeze(-1) for t in back)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, ranges: Sequence[range], tensor: Tensor) -> Tensor:
        ctx.group, ctx.ranges = group, [(r,) for r in ranges]
        return heads_to_tokens([tensor.unsqueeze(-1)], ctx.ranges, group)[0].squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, tokens_to_heads([grad.unsqueeze(-1)], ctx.ranges, ctx.group)[0].squeeze(-1)


class _Halo(torch.autograd.Function):
    """The last tokens of the ranks before, gathered: a convolution's kernel is 4 tokens wide, so they are few."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, spread: Spread) -> Tensor:
        few = min(tokens, len(x))
        tails = [torch.empty_like(x[:few]) for _ in range(spread.sp)]
        dist.all_gather(tails, x[len(x) - few :].contiguous(), group=spread.group)
        ctx.spread, ctx.shape, ctx.few = spread, x.shape, few
        before = torch.cat([x[:0], *tails[: spread.rank]])
        return before[max(0, len(before) - tokens) :]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        spread, (s, channels), few = ctx.spread, ctx.shape, ctx.few
        total = torch.zeros(
            spread.sp * few, channels, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device
        )
        end = spread.rank * few
        total[end - len(grad) : end] = grad
        dist.all_reduce(total, group=spread.group)
        dx = grad.new_zeros(s, channels)
        dx[s - few :] = total[end : end + few]
        return dx, None, None
