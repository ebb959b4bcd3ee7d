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


@dataclass(frozen=True)
class HeadShare:
    """The heads one rank works on inside attention."""

    q: range  # query heads of the model
    kv: range  # key/value heads of the model they read
    repeat: tuple[int, ...] | None
    """Kernels read kv head i with query heads i*g .. (i+1)*g - 1. Where this rank's queries do not fall into groups of
    one size, received kv heads are repeated by this index so that they do; None where nothing is repeated."""


@lru_cache(maxsize=64)
def deal_heads(q_heads: int, kv_heads: int, sp: int) -> tuple[HeadShare, ...]:
    """Heads of each of `sp` ranks: contiguous runs whose sizes differ by at most one.

    Borders at floor(i * q_heads / sp) fall on kv-group borders whenever they can (28 q / 4 kv heads on 8 ranks: 3 and 4
    query heads by turns, one kv head each, nothing repeated).
    """
    assert q_heads % kv_heads == 0, (q_heads, kv_heads)
    assert 1 <= sp <= q_heads, (q_heads, sp)
    group = q_heads // kv_heads
    shares = []
    for rank in range(sp):
        q = range(rank * q_heads // sp, (rank + 1) * q_heads // sp)
        kv = range(q.start // group, (q.stop - 1) // group + 1)
        # How many of this rank's query heads read each received kv head.
        readers = [min(q.stop, (j + 1) * group) - max(q.start, j * group) for j in kv]
        common = math.gcd(*readers)
        repeat = tuple(i for i, n in enumerate(readers) for _ in range(n // common))
        shares.append(HeadShare(q, kv, repeat if len(repeat) > len(kv) else None))
    return tuple(shares)


def tokens_to_heads(
    tensors: Sequence[Tensor], ranges: Sequence[Sequence[range]], group: ProcessGroup | None
) -> list[Tensor]:
    """Exchange local tensors [s, H, d], all heads of some tokens, for [S, h, d], some heads of all tokens.

    `ranges[p][i]` are the heads of `tensors[i]` that rank p receives. The results are views of one received buffer
    (stride of a token: all heads received), which the attention kernels read without a copy.
    """
    if group is None:
        return list(tensors)
    me, world = dist.get_rank(group), len(ranges)
    s, _, d = tensors[0].shape
    widths = [sum(len(heads) for heads in per_rank) for per_rank in ranges]
    sizes = [s * width * d for width in widths]
    send = tensors[0].new_empty(sum(sizes))
    for per_rank, width, block in zip(ranges, widths, send.split(sizes), strict=True):
        parts = [t[:, heads.start : heads.stop] for t, heads in zip(tensors, per_rank, strict=True)]
        _join(parts, block.view(s, width, d))  # [s, heads for that rank, d]
    received = send.new_empty(world * sizes[me])
    dist.all_to_all_single(received, send, [sizes[me]] * world, sizes, group=group)
    # Rank order is token order, so [P, s, h, d] is already [S, h, d].
    return list(received.view(world * s, widths[me], d).split([len(heads) for heads in ranges[me]], dim=1))


def heads_to_tokens(
    tensors: Sequence[Tensor], ranges: Sequence[Sequence[range]], group: ProcessGroup | None
) -> list[Tensor]:
    """Exchange [S, h, d], some heads of all tokens, back for [s, H, d], all heads of the local tokens.

    Heads that several ranks hold are summed, which is what their gradient asks for.
    """
    if group is None:
        return [t.contiguous() for t in tensors]
    me, world = dist.get_rank(group), len(ranges)
    big_s, _, d = tensors[0].shape
    s = big_s // world
    widths = [sum(len(heads) for heads in per_rank) for per_rank in ranges]
    if len(tensors) == 1 and tensors[0].is_contiguous():
        send = tensors[0]  # [S, h, d], already rank by rank
    else:
        send = _join(tensors, tensors[0].new_empty(big_s, widths[me], d))
    sizes = [s * width * d for width in widths]
    received = send.new_empty(sum(sizes))
    dist.all_to_all_single(received, send.view(-1), sizes, [s * widths[me] * d] * world, group=group)
    blocks = [block.view(s, width, d) for block, width in zip(received.split(sizes), widths, strict=True)]
    out, offsets = [], [0] * world
    for i in range(len(tensors)):
        heads = [per_rank[i] for per_rank in ranges]
        parts = [b[:, o : o + len(h)] for b, o, h in zip(blocks, offsets, heads, strict=True)]  # [s, h of rank p, d]
        offsets = [o + len(h) for o, h in zip(offsets, heads, strict=True)]
        out.append(_assemble(parts, heads))
    return out


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
