"""Mamba-1's selective scan, arXiv 2312.00752, in torch: a hundred operations for a piece of tokens, in bounded memory.

    h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t        y_t = h_t . c_t

The tokens are worked on a piece at a time. Inside of a piece its rows of tokens run side by side: first each from a
state of zero, to know what a row adds and what it leaves of the state before it; then again, each from its own state.
States of all tokens exist for one piece at a time. The backward pass makes them again, and goes through a piece in the
same way from its end: u_t = exp(dt_t a) (dy_t c_t + u_(t+1)) is what h_(t-1) gets.

Letters: S tokens of the pack, T of a piece, C channels, N features of a channel's state.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ds_longft.sequence.tiles import tiles_of

PIECE_TOKENS = 1024
"""Their states take 512 MiB for 8,192 channels of 16 features in float32; a backward pass has five such tensors. Fewer
tokens would fit a CPU's cache better (256: a third faster there), and need more launches on a GPU."""


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, inside: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """x and dt [S, C], a [C, N] negative, b and c [S, N], all of one dtype.

    `inside` [S] bool: false for the first token of a document, whose state starts at zero. `ends` [E] int64: tokens in
    ascending order behind which the state is wanted.
    Returns [S, C], and the states [E, C, N], without gradient.
    """
    return _Scan.apply(x, dt, a, b, c, inside, ends)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, inside: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        state, before, out, wanted = torch.zeros_like(a), [], torch.empty_like(x), [a.new_empty(0, *a.shape)]
        for piece in tiles_of(len(x), PIECE_TOKENS):
            before.append(state)
            states = _states(x[piece], dt[piece], a, b[piece], inside[piece], state)[1]
            out[piece] = torch.einsum("tcn,tn->tc", states, c[piece])
            if len(ends):
                wanted.append(states[ends[(ends >= piece.start) & (ends < piece.stop)] - piece.start])
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, a, b, c, inside, torch.stack(before))
        behind = torch.cat(wanted)
        ctx.mark_non_differentiable(behind)
        return out, behind

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> Any:
        x, dt, a, b, c, inside, before = ctx.saved_tensors
        dx, ddt, db, dc = (torch.empty_like(t) for t in (x, dt, b, c))
        da, u = torch.zeros_like(a), torch.zeros_like(a)
        for i, piece in reversed([*enumerate(tiles_of(len(x), PIECE_TOKENS))]):
            xs, dts, bs = x[piece], dt[piece], b[piece]
            decay, states = _states(xs, dts, a, bs, inside[piece], before[i])
            dc[piece] = torch.einsum("tcn,tc->tn", states, dout[piece])
            dstates = dout[piece][..., None] * c[piece][:, None]
            handed = _scanned(decay, decay * dstates, u, from_end=True)  # [T, C, N]: u of each token
            dstates[:-1] += handed[1:]
            dstates[-1] += u
            u = handed[0].clone()
            db[piece] = torch.einsum("tcn,tc->tn", dstates, dts * xs)
            of_added = torch.einsum("tcn,tn->tc", dstates, bs)  # of dt x
            del dstates
            handed[1:] *= states[:-1]  # of dt a
            handed[0] *= before[i]
            da += torch.einsum("tcn,tc->cn", handed, dts)
            dx[piece] = of_added * dts
            ddt[piece] = of_added * xs + torch.einsum("tcn,cn->tc", handed, a)
        return dx, ddt, da, db, dc, None, None


def _states(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, inside: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Of a piece: what each token leaves of the state before it, and the states; [T, C, N] both."""
    # A state that is multiplied by zero at a document's first token has forgotten the one before.
    decay = (dt[..., None] * a).exp_().mul_(inside[:, None, None])
    return decay, _scanned(decay, (dt * x)[..., None] * b[:, None], before)


def _scanned(decay: Tensor, added: Tensor, before: Tensor, *, from_end: bool = False) -> Tensor:
    """s_t = decay_t s_(t-1) + added_t, or s_(t+1) in place of s_(t-1): [T, C, N], with s [C, N] before the first.

    Written over `added`.
    """
    width = isqrt(len(decay))
    tail = len(decay) % width  # of tokens that fill no row; the last to be worked on, or the first
    whole = len(decay) - tail
    if from_end:
        for t in range(len(decay) - 1, whole - 1, -1):
            before = torch.addcmul(added[t], decay[t], before, out=added[t])
    left, s = (t[:whole].unflatten(0, (-1, width)) for t in (decay, added))  # [rows, width, C, N]
    columns, rows = list(range(width)), list(range(whole // width))
    if from_end:
        columns.reverse()
        rows.reverse()
    end, share = s[:, columns[0]].clone(), left[:, columns[0]].clone()
    for t in columns[1:]:
        torch.addcmul(s[:, t], left[:, t], end, out=end)
        share *= left[:, t]
    state = torch.empty_like(end)  # before each row
    for row in rows:
        state[row] = before
        before = torch.addcmul(end[row], share[row], before)
    for t in columns:
        state = torch.addcmul(s[:, t], left[:, t], state, out=s[:, t])
    if not from_end:
        for t in range(whole, len(decay)):
            before = torch.addcmul(added[t], decay[t], before, out=added[t])
    return added
