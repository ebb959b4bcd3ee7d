"""How the tokens of a pack lie on ranks, and what layers with a state need of the other ranks.

A recurrence is per head, or per channel: tokens are exchanged for heads as for attention, it then runs over whole
documents, and comes back. Here everything is differentiable by itself: forward one all-to-all, backward the opposite.
Where channels are mixed before they could be dealt, a causal convolution reads the last tokens of the ranks before.

Letters: s tokens of this rank, S of the pack, C channels of the model, c of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ds_longft.batch import Documents
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.exchange import HeadShare, deal_heads, heads_to_tokens, tokens_to_heads
from ds_longft.sequence.state.carried import Carried


@dataclass(frozen=True)
class Spread:
    """The documents that a layer works on, and the ranks that hold their tokens."""

    documents: Documents
    sp: int
    rank: int  # in the sp group
    group: ProcessGroup | None
    carried: Carried | None = None  # where answers are made

    @classmethod
    def of(cls, documents: Documents, layout: ParallelLayout, carried: Carried | None = None) -> Spread:
        """The whole pack over the sp group; where each rank holds whole documents, these on this rank alone."""
        if documents.own is not None:
            assert carried is None, "answers are made of texts that lie on all ranks"
            return cls(documents.own, 1, 0, None)
        return cls(documents, layout.sp, layout.sp_rank, layout.group, carried)

    def deal(self, heads: int, groups: int, layer: str) -> tuple[HeadShare, ...]:
        """The heads of each rank, and the groups (of keys, or of B and C) that they read.

        Raises:
            ModelError: more ranks than heads.
        """
        if self.sp > heads:
            raise ModelError(f"sp is {self.sp}, but {layer} has {heads} heads: sp can be at most that")
        return deal_heads(heads, groups, self.sp)

    def to_heads(self, tensors: Sequence[Tensor], ranges: Sequence[Sequence[range]]) -> tuple[Tensor, ...]:
        """[s, C] each -> [S, c] each; `ranges`: the channels of each tensor that each rank works on."""
        if self.group is None:
            return tuple(tensors)
        out: tuple[Tensor, ...] = _ToHeads.apply(self.group, ranges, *tensors)
        return out

    def to_tokens(self, tensor: Tensor, ranges: Sequence[range]) -> Tensor:
        """[S, c] -> [s, C]; `ranges`: the channels of each rank, without gap or overlap."""
        if self.group is None:
            return tensor
        out: Tensor = _ToTokens.apply(self.group, ranges, tensor)
        return out

    def positions(self) -> Tensor:
        """[S] int64: each token's place in its document."""
        return self.documents.positions

    def with_halo(self, x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """x [s, C] -> [h + s, C] with the `tokens` tokens before it, fewer at the pack's start; their positions.

        A rank may hold fewer tokens than that: then they come of several ranks.
        """
        positions = self.positions()
        if self.group is None:
            return x, positions
        start = self.rank * len(x)
        halo: Tensor = _Halo.apply(x, tokens, self)
        return torch.cat([halo, x]), positions[start - len(halo) : start + len(x)]


class NextTokens(Spread):
    """One more token of each text, the same on every rank; `documents` are those that were read."""

    def to_heads(self, tensors: Sequence[Tensor], ranges: Sequence[Sequence[range]]) -> tuple[Tensor, ...]:
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
    def forward(ctx: Any, group: ProcessGroup, ranges: Sequence[Sequence[range]], *tensors: Tensor) -> Any:
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
