"""The piece of `chunk_backward.py` as one Triton kernel that Triton 3.4 to 3.7.0 compiles rightly on Hopper.

What goes wrong there is the transpose of a product that lies in the registers of the tensor cores (FLA's issue 640):
the gradient of the scores, transposed for that of the keys. Here both are products, dA = do v^T and dA^T = v do^T, and
what is transposed was loaded. No trust all the same: `agrees` runs it beside torch's products before it is used.

Of a pack's 131,072 tokens, 32 heads of 128 features, torch moves 160 GB and this some 20, by count.
Letters as in `chunk_backward.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_longft.sequence.state import chunk_backward as in_torch
from ds_longft.sequence.state.chunk_backward import Gradients, Handed
from ds_longft.sequence.state.spread import CHUNK_TOKENS

KEYS_AT_A_TIME = VALUES_AT_A_TIME = 64
"""Features of a program: sums of 64 x 64 in float32 are 32 registers a thread, and there are five."""

WARPS, STAGES = 4, 2
ROWS_AT_A_TIME = 1 << 17
"""Tokens times heads whose dq and dk wait to be summed over heads that share keys: 32 MiB each of 128 bf16 features."""

ALLOWED = 2e-2  # of the norm, in half precision
REPEATS = 4


def chunk_backward(handed: Handed) -> Gradients:
    """The piece, for chunks of 16, 32 or 64 tokens."""
    q, k, v, do, h, dh, g = (t.contiguous() for t in (*handed[:6], handed.g))
    w, dv, scale, chunk_size = handed.w, handed.dv, handed.scale, handed.chunk_size
    cu_seqlens, chunk_indices = handed.cu_seqlens, handed.chunk_indices.contiguous()
    (tokens, groups, keys), (heads, values) = q.shape[1:], v.shape[2:]
    blocks = triton.cdiv(keys, KEYS_AT_A_TIME)
    dg = g.new_empty(blocks, tokens, heads)
    dw = None if w is None else w.new_empty(1, tokens, heads, keys)

    def launch(first: int, some: Tensor, dq: Tensor, dk: Tensor) -> None:
        with torch.cuda.device_of(q):
            _piece[(len(some) * blocks, heads)](
                q, k, v, do, h, dh, v if dv is None else dv.contiguous(), g, dq, dk, q if dw is None else dw, dg,
                some, cu_seqlens, float(scale), first, tokens, groups, heads,
                K=keys, V=values, C=chunk_size, BK=KEYS_AT_A_TIME, BV=VALUES_AT_A_TIME, HAS_W=dw is not None,
                num_warps=WARPS, num_stages=STAGES,
            )  # fmt: skip

    if groups == heads:
        dq, dk = (t.new_empty(tokens, heads, keys) for t in (q, k))
        launch(0, chunk_indices, dq, dk)
        return dq[None], dk[None], dw, dg.sum(0)[None]
    # a row more, which the places behind a document's end are written to
    dq, dk = (t.new_empty(tokens + 1, groups, keys) for t in (q, k))
    at_a_time = max(1, ROWS_AT_A_TIME // (heads * chunk_size))
    for first in range(0, len(chunk_indices), at_a_time):
        some = chunk_indices[first : first + at_a_time]
        of_heads = [t.new_empty(len(some) * chunk_size, heads, keys) for t in (q, k)]
        launch(first, some, *of_heads)
        rows, _ends, inside = in_torch.rows_of(some, cu_seqlens, chunk_size)  # [n, c]
        read, written = (rows - rows[0, 0]).clamp(max=len(some) * chunk_size - 1), rows.where(inside, tokens)
        for out, each in zip((dq, dk), of_heads, strict=True):
            out[written] = each.unflatten(1, (groups, -1)).sum(2, dtype=torch.float32).to(out.dtype)[read]
    return dq[None, :tokens], dk[None, :tokens], dw, dg.sum(0)[None]


@triton.jit(do_not_specialize=["first_chunk", "tokens", "groups", "heads"])
def _piece(  # type: ignore[no-untyped-def]  # one binary for all numbers of heads, so that what `agrees` tries is what runs
    q, k, v, do, h, dh, dv, g, dq, dk, dw, dg, chunks, cu_seqlens, scale, first_chunk, tokens, groups, heads,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HAS_W: tl.constexpr,
):  # fmt: skip
    """One chunk and head, BK features of its keys. Rows of dq and dk count from the first of these chunks."""
    blocks = tl.cdiv(K, BK)
    part, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    head = tl.program_id(1).to(tl.int64)
    document = tl.load(chunks + 2 * part).to(tl.int64)
    begin = tl.load(cu_seqlens + document).to(tl.int64) + tl.load(chunks + 2 * part + 1).to(tl.int64) * C
    end = tl.minimum(begin + C, tl.load(cu_seqlens + document + 1).to(tl.int64))
    place = tl.arange(0, C)
    rows = begin + place
    inside = rows < end
    features = block * BK + tl.arange(0, BK)
    of_keys = inside[:, None] & (features < K)[None, :]
    state = ((first_chunk + part) * heads + head) * K * V

    dq_sum = tl.zeros([C, BK], dtype=tl.float32)
    dk_sum = tl.zeros([C, BK], dtype=tl.float32)
    dw_sum = tl.zeros([C, BK], dtype=tl.float32)
    da = tl.zeros([C, C], dtype=tl.float32)  # [queries, keys]
    da_transposed = tl.zeros([C, C], dtype=tl.float32)
    at_last = 0.0  # of dg, from the state
    for first in range(0, V, BV):
        values = first + tl.arange(0, BV)
        at = (rows[:, None] * heads + head) * V + values[None, :]  # [C, BV]
        of_values = inside[:, None] & (values < V)[None, :]
        v_part = tl.load(v + at, mask=of_values, other=0.0)
        do_part = tl.load(do + at, mask=of_values, other=0.0)
        of_state = state + features[None, :] * V + values[:, None]  # [BV, BK]
        there = (values < V)[:, None] & (features < K)[None, :]
        s = tl.load(h + of_state, mask=there, other=0.0)
        ds = tl.load(dh + of_state, mask=there, other=0.0)
        at_last += tl.sum(s.to(tl.float32) * ds.to(tl.float32))
        da = tl.dot(do_part, tl.trans(v_part), da)
        da_transposed = tl.dot(v_part, tl.trans(do_part), da_transposed)
        dq_sum = tl.dot(do_part, s.to(do_part.dtype), dq_sum)
        dk_sum = tl.dot(v_part, ds.to(v_part.dtype), dk_sum)
        if HAS_W:
            dv_part = tl.load(dv + at, mask=of_values, other=0.0)
            dw_sum = tl.dot(dv_part.to(v_part.dtype), s.to(v_part.dtype), dw_sum)
    if HAS_W:
        out = (rows[:, None] * heads + head) * K + features[None, :]
        tl.store(dw + out, (-dw_sum).to(dw.dtype.element_ty), mask=of_keys)

    of_group = (rows[:, None] * groups + head // (heads // groups)) * K + features[None, :]
    q_part = tl.load(q + of_group, mask=of_keys, other=0.0)
    k_part = tl.load(k + of_group, mask=of_keys, other=0.0)
    decay = tl.load(g + rows * heads + head, mask=inside, other=0.0)  # sums from the chunk's first token
    last = tl.load(g + (end - 1) * heads + head)
    dq_sum = dq_sum * (tl.exp2(decay) * scale)[:, None]
    dk_sum = dk_sum * tl.where(inside, tl.exp2(last - decay), 0.0)[:, None]
    at_last = at_last * tl.exp2(last) + tl.sum(dk_sum * k_part.to(tl.float32))

    both = inside[:, None] & inside[None, :]
    seen = both & (place[:, None] >= place[None, :])
    da = tl.where(seen, da * tl.exp2(decay[:, None] - decay[None, :]), 0.0) * scale
    seen_from = both & (place[:, None] <= place[None, :])  # [keys, queries]
    da_transposed = tl.where(seen_from, da_transposed * tl.exp2(decay[None, :] - decay[:, None]), 0.0) * scale
    dq_sum = tl.dot(da.to(k_part.dtype), k_part, dq_sum)
    dk_sum = tl.dot(da_transposed.to(q_part.dtype), q_part, dk_sum)

    of_decay = tl.sum(dq_sum * q_part.to(tl.float32), 1) - tl.sum(dk_sum * k_part.to(tl.float32), 1)
    of_decay += tl.where(rows == end - 1, at_last, 0.0)
    tl.store(dg + (block * tokens + rows) * heads + head, of_decay, mask=inside)
    from_first = rows - tl.load(cu_seqlens + tl.load(chunks)).to(tl.int64) - tl.load(chunks + 1).to(tl.int64) * C
    of_head = (from_first[:, None] * heads + head) * K + features[None, :]
    tl.store(dq + of_head, dq_sum.to(dq.dtype.element_ty), mask=of_keys)
    tl.store(dk + of_head, dk_sum.to(dk.dtype.element_ty), mask=of_keys)


class Shape(NamedTuple):
    """What the kernel is compiled for."""

    keys: int  # K
    values: int  # V
    dtype: torch.dtype
    of_states: torch.dtype
    has_w: bool  # delta rules
    chunk_tokens: int = CHUNK_TOKENS


@cache
def agrees(shape: Shape, device: torch.device) -> bool:
    """Whether the kernel gives what torch's products give in float32, and the same bits each time.

    On random numbers of that shape, a thousand programs, four on each multiprocessor. Nothing is taken for granted:
    with 32 keys at a time and states in float32 Triton 3.6.0 compiled something else on an H200 (half of the norm off;
    its interpreter is right).
    """
    chunk = shape.chunk_tokens
    handed = random_piece(shape, (chunk + 6, 1, 3 * chunk, 60 * chunk), 4, 8, device)
    found = [torch.cat([t.flatten() for t in chunk_backward(handed) if t is not None]) for _ in range(REPEATS)]
    same = all(torch.equal(found[0], again) for again in found[1:])
    return same and max(errors(handed)) <= ALLOWED


def errors(handed: Handed) -> list[float]:
    """Of the kernel's gradients against torch's in float32, relative by norm."""
    named = handed._asdict().items()
    single: dict[str, Any] = {name: t.float() for name, t in named if isinstance(t, Tensor) and t.is_floating_point()}
    both = zip(chunk_backward(handed), in_torch.chunk_backward(handed._replace(**single)), strict=True)
    return [float((a.float() - b).norm() / b.norm()) for a, b in both if a is not None and b is not None]


def random_piece(shape: Shape, lengths: Sequence[int], groups: int, heads: int, device: torch.device) -> Handed:
    """Random numbers for documents of these lengths, of a generator of its own."""
    tokens, keys, values = sum(lengths), shape.keys, shape.values
    random = torch.Generator(device).manual_seed(0)

    def numbers(*sizes: int, of: torch.dtype = shape.dtype) -> Tensor:
        return torch.randn(1, *sizes, generator=random, device=device).to(of)

    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    chunks = in_torch.chunks_of(cu_seqlens, shape.chunk_tokens)
    q, k = (numbers(tokens, groups, keys) for _ in range(2))
    v, do = (numbers(tokens, heads, values) for _ in range(2))
    h, dh = (numbers(len(chunks), heads, keys, values, of=shape.of_states) for _ in range(2))
    w, dv = (numbers(tokens, heads, d) if shape.has_w else None for d in (keys, values))
    g = -torch.rand(1, tokens, heads, generator=random, device=device)
    return Handed(q, k, v, do, h, dh, w, dv, g, keys**-0.5, cu_seqlens, shape.chunk_tokens, chunks)
