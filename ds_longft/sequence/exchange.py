"""The all-to-all of Ulysses sequence parallelism, for any number of heads.

Before attention a rank holds all heads of its s tokens; inside, it holds some heads of all S tokens.
Query heads are dealt to ranks in contiguous runs, as evenly as they go; a rank receives the key/value heads its query
heads need, so a key/value head whose queries lie on two ranks travels to both (its gradient is summed on the way back).
Everything that goes the same way travels in one collective, with unequal splits where head counts are uneven.

Letters: P ranks of the sp group, S = P * s tokens, H heads of the model, h heads of this rank, d head size.
Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Ranges = Sequence[Sequence[range]]
"""`ranges[p][i]`: the heads of `tensors[i]` that rank p works on."""


@dataclass(frozen=True)
class HeadShare:
    """The heads one rank works on inside attention."""

    q: range  # query heads of the model
    kv: range  # key/value heads of the model they read
    # Kernels read kv head i with query heads i*g .. (i+1)*g - 1. Where this rank's queries do not fall into groups of
    # one size, received kv heads are repeated by this index so that they do.
    repeat: tuple[int, ...] | None

    def repeated(self, kv: Tensor) -> Tensor:
        """Keys or values [S, kv received, d] -> [S, kv as the kernel reads them, d].

        By slices: an index made here would be copied from the host, and the device waited for, in every layer.
        """
        if self.repeat is None:
            return kv
        return _join([kv[:, i : i + 1] for i in self.repeat], kv.new_empty(kv.shape[0], len(self.repeat), kv.shape[2]))

    def summed(self, dkv: Tensor) -> Tensor:
        """Gradient of `repeated`, summed in at least float32: [S, kv of the kernel, d] -> [S, kv received, d]."""
        if self.repeat is None:
            return dkv
        total = dkv.new_empty(dkv.shape[0], len(self.kv), dkv.shape[2])
        dtype = torch.promote_types(dkv.dtype, torch.float32)
        parts = dkv.split([self.repeat.count(i) for i in range(len(self.kv))], dim=1)  # copies of one head side by side
        for i, part in enumerate(parts):
            total[:, i] = part.sum(1, dtype=dtype)
        return total


@lru_cache(maxsize=64)
def deal_heads(q_heads: int, kv_heads: int, sp: int) -> tuple[HeadShare, ...]:
    """Heads of each of `sp` ranks: contiguous runs whose sizes differ by at most one.

    Borders at floor(i * q_heads / sp) fall on kv-group borders whenever they can (28 q / 4 kv heads on 8 ranks: 3 and 4
    query heads by turns, one kv head each, nothing repeated).
    """
    assert q_heads % kv_heads == 0, (q_heads, kv_heads)
    assert 1 <= sp <= q_heads, (q_heads, sp)
    group = q_heads // kv_heads
    return tuple(share_of(range(i * q_heads // sp, (i + 1) * q_heads // sp), group) for i in range(sp))


@lru_cache(maxsize=64)
def deal_in_turns(q_heads: int, kv_heads: int, sp: int, kv_at_a_time: int) -> tuple[tuple[HeadShare, ...], ...]:
    """The same shares, in turns: in each, a rank works on `kv_at_a_time` of its key/value heads and their queries.

    Every rank takes part in every turn, with an empty share where it has fewer heads than another.
    """
    assert kv_at_a_time >= 1, kv_at_a_time
    group = q_heads // kv_heads
    shares = deal_heads(q_heads, kv_heads, sp)
    turns = -(-max(len(share.kv) for share in shares) // kv_at_a_time)

    def part(share: HeadShare, turn: int) -> HeadShare:
        kv = share.kv[turn * kv_at_a_time : (turn + 1) * kv_at_a_time]
        q = range(max(share.q.start, kv.start * group), min(share.q.stop, kv.stop * group))
        return share_of(q, group) if kv and q else HeadShare(range(0), range(0), None)

    return tuple(tuple(part(share, turn) for share in shares) for turn in range(turns))


def share_of(q: range, group: int) -> HeadShare:
    """The share of a rank with these query heads, `group` of which read one kv head."""
    kv = range(q.start // group, (q.stop - 1) // group + 1)
    # How many of this rank's query heads read each received kv head.
    readers = [min(q.stop, (j + 1) * group) - max(q.start, j * group) for j in kv]
    common = math.gcd(*readers)
    repeat = tuple(i for i, n in enumerate(readers) for _ in range(n // common))
    return HeadShare(q, kv, repeat if len(repeat) > len(kv) else None)


@dataclass
class Buffers:
    """Memory for what is sent and received, made once and used by every turn."""

    sent: Tensor | None = None
    received: Tensor | None = None

    def take(self, name: str, elements: int, like: Tensor) -> Tensor:
        """`elements` of one of the two, enlarged where they are too few."""
        memory = getattr(self, name)
        if memory is None or memory.numel() < elements:
            setattr(self, name, None)
            del memory  # before the larger one is made
            memory = like.new_empty(elements)
            setattr(self, name, memory)
        return memory[:elements]


def tokens_to_heads(
    tensors: Sequence[Tensor], ranges: Ranges, group: ProcessGroup | None, buffers: Buffers | None = None
) -> list[Tensor]:
    """Exchange local tensors [s, H, d], all heads of some tokens, for [S, h, d], some heads of all tokens.

    The results are views of one received buffer (stride of a token: all heads received), which the attention kernels
    read without a copy. With `buffers` they are valid until the next exchange with the same.
    """
    if group is None:
        return [t[:, heads.start : heads.stop] for t, heads in zip(tensors, ranges[0], strict=True)]
    buffers = buffers or Buffers()
    me, world = dist.get_rank(group), len(ranges)
    s, _, d = tensors[0].shape
    widths = [sum(len(heads) for heads in per_rank) for per_rank in ranges]
    sizes = [s * width * d for width in widths]
    send = buffers.take("sent", sum(sizes), tensors[0])
    for per_rank, width, block in zip(ranges, widths, send.split(sizes), strict=True):
        parts = [t[:, heads.start : heads.stop] for t, heads in zip(tensors, per_rank, strict=True)]
        _join(parts, block.view(s, width, d))  # [s, heads for that rank, d]
    received = buffers.take("received", world * sizes[me], tensors[0])
    dist.all_to_all_single(received, send, [sizes[me]] * world, sizes, group=group)
    # Rank order is token order, so [P, s, h, d] is already [S, h, d].
    return list(received.view(world * s, widths[me], d).split([len(heads) for heads in ranges[me]], dim=1))


def heads_to_tokens(tensors: Sequence[Tensor], ranges: Ranges, group: ProcessGroup | None) -> list[Tensor]:
    """Exchange [S, h, d], some heads of all tokens, back for [s, H, d], all heads of the local tokens.

    Heads that several ranks hold are summed, which is what their gradient asks for.
    """
    if group is None:
        return [t.contiguous() for t in tensors]
    parts = _back(tensors, ranges, group, Buffers())
    return [_assemble(blocks, [per_rank[i] for per_rank in ranges]) for i, blocks in enumerate(parts)]


def heads_into(
    totals: Sequence[Tensor],
    tensors: Sequence[Tensor],
    ranges: Ranges,
    group: ProcessGroup | None,
    buffers: Buffers,
    summed: Sequence[bool],
) -> None:
    """The same for one turn: into `totals` [s, H, d] of all turns, written, or added to where `summed` says so."""
    parts = [[t] for t in tensors] if group is None else _back(tensors, ranges, group, buffers)
    for i, (total, blocks) in enumerate(zip(totals, parts, strict=True)):
        for block, per_rank in zip(blocks, ranges, strict=True):
            heads = per_rank[i]
            place = total[:, heads.start : heads.stop]
            if summed[i]:
                place.add_(block)
            else:
                place.copy_(block)


def shared_heads(shares: Sequence[HeadShare]) -> bool:
    """Whether some key/value head is on two ranks."""
    return any(b.kv.start < a.kv.stop for a, b in pairwise(shares))


def _back(tensors: Sequence[Tensor], ranges: Ranges, group: ProcessGroup, buffers: Buffers) -> list[list[Tensor]]:
    """For each tensor the parts [s, h of rank p, d] that each rank p sent."""
    me, world = dist.get_rank(group), len(ranges)
    big_s, _, d = tensors[0].shape
    s = big_s // world
    widths = [sum(len(heads) for heads in per_rank) for per_rank in ranges]
    if len(tensors) == 1 and tensors[0].is_contiguous():
        send = tensors[0].reshape(-1)  # [S, h, d], already rank by rank
    else:
        send = buffers.take("sent", big_s * widths[me] * d, tensors[0])
        _join(tensors, send.view(big_s, widths[me], d))
    sizes = [s * width * d for width in widths]
    received = buffers.take("received", sum(sizes), tensors[0])
    dist.all_to_all_single(received, send, sizes, [s * widths[me] * d] * world, group=group)
    blocks = [block.view(s, width, d) for block, width in zip(received.split(sizes), widths, strict=True)]
    parts: list[list[Tensor]] = []
    offsets = [0] * world
    for i in range(len(tensors)):
        heads = [per_rank[i] for per_rank in ranges]
        parts.append([b[:, o : o + len(h)] for b, o, h in zip(blocks, offsets, heads, strict=True)])
        offsets = [o + len(h) for o, h in zip(offsets, heads, strict=True)]
    return parts


def _join(parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """torch.cat(parts, dim=1, out=out), as 16-byte elements where all tensors allow it.

    torch's strided copies move one element a thread: 2 bytes at a time they reach a third of the memory's bandwidth.
    """
    ratio = 16 // out.element_size()

    def fits(t: Tensor) -> bool:
        steps = (t.shape[-1], t.storage_offset(), *t.stride()[:-1])
        return t.dtype == out.dtype and t.stride(-1) == 1 and not any(step % ratio for step in steps)

    if ratio > 1 and fits(out) and all(map(fits, parts)):
        torch.cat([p.view(torch.complex128) for p in parts], dim=1, out=out.view(torch.complex128))
    else:
        torch.cat(list(parts), dim=1, out=out)
    return out


def _assemble(parts: list[Tensor], heads: list[range]) -> Tensor:
    """Parts [s, h_p, d] -> [s, H, d]; side by side where no head came twice, else summed in at least float32."""
    if all(a.stop == b.start for a, b in pairwise(heads)):
        return _join(parts, parts[0].new_empty(parts[0].shape[0], sum(map(len, heads)), parts[0].shape[2]))
    s, _, d = parts[0].shape
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    total = parts[0].new_zeros(s, max(h.stop for h in heads), d, dtype=dtype)
    for part, h in zip(parts, heads, strict=True):
        total[:, h.start : h.stop] += part
    return total.to(parts[0].dtype)
