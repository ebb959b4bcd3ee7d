"""The piece of flash-linear-attention's backward pass that `chunk_piece.py` is about, in torch.

Per chunk of c tokens and head, with S the state before it, dS the gradient of the state behind it, G the running sum of
the decays' logarithms (to base 2), all of it batched products:
    dA = tril(do v^T 2^(G_i - G_j)) scale
    dq = do S^T 2^G scale + dA k        dk = v dS^T 2^(G_last - G) + dA^T q        dw = -dv S^T
    dG = rowsum(dq q) - rowsum(dk k), at the chunk's last token also <S, dS> 2^G_last + sum of (v dS^T 2^(..)) k
Letters: S tokens, N chunks, c tokens of one, G groups of heads that share keys, H heads, K and V their features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_longft.sequence.tiles import wide

STATES_AT_A_TIME = 4096
"""Chunks times heads of one turn: 256 MiB for 128 x 128 elements in float32."""


class Handed(NamedTuple):
    """What FLA hands to `chunk_bwd_dqkwg` (`fla/ops/common/chunk_o.py` of 0.6.0)."""

    q: Tensor  # [1, S, G, K]
    k: Tensor  # [1, S, G, K]
    v: Tensor  # [1, S, H, V]
    do: Tensor  # [1, S, H, V]
    h: Tensor  # [1, N, H, K, V]
    dh: Tensor  # [1, N, H, K, V]
    w: Tensor | None  # [1, S, H, K], of delta rules
    dv: Tensor | None  # [1, S, H, V], likewise
    g: Tensor  # [1, S, H] float32
    scale: float
    cu_seqlens: Tensor
    chunk_size: int
    chunk_indices: Tensor  # [N, 2]: the document of each chunk, and its number there


Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""dq, dk like q and k, dw [1, S, H, K] where there is w, dg [1, S, H] float32."""


def chunk_backward(handed: Handed) -> Gradients:
    """The piece, as products of torch."""
    q, k, v, do, h, dh, w, dv, g, scale, cu_seqlens, chunk_size, chunk_indices = handed
    tokens, groups, heads = q.shape[1], q.shape[2], v.shape[2]
    # a row more, which the places behind a document's end are written to
    dq, dk, dg = (t.new_empty(tokens + 1, *t.shape[2:]) for t in (q[0:1], k[0:1], g))
    dw = None if w is None else w.new_empty(tokens + 1, *w.shape[2:])
    for part in range(0, len(chunk_indices), max(1, STATES_AT_A_TIME // heads)):
        some = slice(part, part + max(1, STATES_AT_A_TIME // heads))
        rows, end, inside = rows_of(chunk_indices[some], cu_seqlens, chunk_size)
        read, written = rows.clamp(max=tokens - 1), rows.where(inside, tokens)
        seen = inside[:, None, :, None]

        def taken(t: Tensor, read: Tensor = read) -> Tensor:
            return t[0, read].transpose(1, 2).repeat_interleave(heads // t.shape[2], 1)  # [n, H, c, d]

        qc, kc = taken(q), taken(k)
        vc, doc = taken(v) * seen, taken(do) * seen
        gc = g[0, read].transpose(1, 2)  # [n, H, c]
        last = g[0, end - 1][..., None]  # [n, H, 1]
        gc = torch.where(inside[:, None], gc, last)
        state, dstate = h[0, some].to(q.dtype), dh[0, some].to(q.dtype)  # [n, H, K, V]
        decay = (gc[..., :, None] - gc[..., None, :]).tril().exp2().tril()  # [n, H, c, c]
        dqc = _product(doc, state.mT) * gc.exp2()[..., None] * scale
        dkc = _product(vc, dstate.mT) * (last - gc).exp2()[..., None]
        at_last = (wide(h[0, some]) * dh[0, some]).sum((2, 3)) * last[..., 0].exp2() + (dkc * kc).sum((2, 3))
        da = (_product(doc, vc.mT) * decay * scale).to(q.dtype)
        dqc += _product(da, kc)
        dkc += _product(da.mT, qc)
        dgc = (dqc * qc).sum(-1) - (dkc * kc).sum(-1)  # [n, H, c]
        dgc += at_last[..., None] * (rows == end[:, None] - 1)[:, None]
        for out, t in ((dq, dqc), (dk, dkc)):
            out[written] = t.unflatten(1, (groups, -1)).sum(2).transpose(1, 2).to(out.dtype)
        dg[written] = dgc.transpose(1, 2)
        if dw is not None and dv is not None:
            dw[written] = -_product((taken(dv) * seen).to(state.dtype), state.mT).transpose(1, 2).to(dw.dtype)
    return dq[None, :tokens], dk[None, :tokens], None if dw is None else dw[None, :tokens], dg[None, :tokens]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[n, H, i, j] @ [n, H, j, l], summed and returned in float32 at least."""
    if a.is_cuda and a.dtype != torch.float32:
        flat = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return flat.unflatten(0, a.shape[:2])
    return wide(a) @ wide(b)


def chunks_of(cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """[N, 2]: document and number of each chunk."""
    counts = -(-cu_seqlens.diff() // chunk_size)
    document = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    number = torch.arange(len(document), device=counts.device) - (counts.cumsum(0) - counts)[document]
    return torch.stack([document, number], 1)


def rows_of(chunk_indices: Tensor, cu_seqlens: Tensor, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of n chunks [n, 2]: places [n, c] of their tokens in the pack, each one's end [n], which places are inside."""
    document, number = chunk_indices.long().unbind(1)
    begin = cu_seqlens.long()[document] + number * chunk_size
    end = torch.minimum(begin + chunk_size, cu_seqlens.long()[document + 1])
    rows = begin[:, None] + torch.arange(chunk_size, device=cu_seqlens.device)
    return rows, end, rows < end[:, None]
