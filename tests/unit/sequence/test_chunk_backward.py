"""Our piece of flash-linear-attention's backward pass, from the states that FLA hands over: against autograd."""

from __future__ import annotations

from itertools import chain
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ds_longft.batch import Documents
from ds_longft.sequence.exchange import share_of
from ds_longft.sequence.state import chunk_backward, chunk_piece, spread
from ds_longft.sequence.state.recurrence import decayed_attention

LENGTHS = (70, 1, 3, 64, 200)
CHUNK, GROUPS, HEADS, K, V = 64, 2, 6, 8, 5


def chunks() -> list[list[tuple[int, int]]]:
    """(first, end) of each chunk, by documents."""
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    return [
        [(i, min(i + CHUNK, end)) for i in range(end - n, end, CHUNK)] for n, end in zip(LENGTHS, ends, strict=True)
    ]


def handed_over(q: Tensor, k: Tensor, v: Tensor, g: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states before chunks, the gradients of those behind them, and sums of the decays in a chunk, to base 2."""
    before, behind, sums = [], [], torch.zeros_like(g)
    for document in chunks():
        state = dstate = torch.zeros(HEADS, K, V, dtype=q.dtype)
        later: list[Tensor] = []
        for i, j in document:
            before.append(state)
            total = g[i:j].cumsum(0)
            sums[i:j] = total / torch.log(torch.tensor(2.0, dtype=g.dtype))
            added = torch.einsum("chk,chv,ch->hkv", k[i:j], v[i:j], (total[-1] - total).exp())
            state = state * total[-1].exp()[:, None, None] + added
        for i, j in reversed(document):
            later.insert(0, dstate)
            total = g[i:j].cumsum(0)
            added = torch.einsum("chk,chv,ch->hkv", q[i:j], do[i:j], total.exp())
            dstate = dstate * total[-1].exp()[:, None, None] + added
        behind += later
    return torch.stack(before)[None], torch.stack(behind)[None], sums


@pytest.mark.parametrize("at_a_time", [1, HEADS * 3, 4096], ids=["a chunk a turn", "three", "all"])
def test_gradients_are_those_of_autograd(at_a_time: int) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    q, k, v = (torch.randn(tokens, n, d, dtype=torch.float64) for n, d in ((GROUPS, K), (GROUPS, K), (HEADS, V)))
    g = -0.02 * torch.rand(tokens, HEADS, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (q, k, v, g)]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    out = decayed_attention(*inputs, Documents(cu_seqlens.int(), LENGTHS))
    do = torch.randn_like(out)
    wanted = torch.autograd.grad(out, inputs, do)
    with torch.no_grad(), patch.object(chunk_backward, "STATES_AT_A_TIME", at_a_time):
        qh, kh = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (q, k))
        h, dh, sums = handed_over(qh, kh, v, g, do)
        dq, dk, dw, of_sums = chunk_piece.backward_piece(
            q[None], k[None], v[None], do[None], h, dh, w=qh[None], g=sums[None], dv=do[None], cu_seqlens=cu_seqlens
        )
        dg = torch.cat([of_sums[0, i:j].flip(0).cumsum(0).flip(0) for document in chunks() for i, j in document])
        states = torch.cat([h[0, n].expand(j - i, -1, -1, -1) for n, (i, j) in enumerate(chain(*chunks()))])
    torch.testing.assert_close(dq[0], wanted[0])
    torch.testing.assert_close(dk[0], wanted[1])
    torch.testing.assert_close(dg, wanted[3])
    assert dw is not None
    torch.testing.assert_close(dw[0], -torch.einsum("thv,thkv->thk", do, states))


@pytest.mark.parametrize(
    ("tokens", "heads", "sp", "state", "few", "turns"),
    [
        (131072, 32, 1, 128 * 128, False, 1),
        (131073, 32, 1, 128 * 128, False, 2),
        (131072, 128, 1, 128 * 64, False, 2),  # Mamba-2's
        (131072, 128, 2, 128 * 64, False, 1),
        (131072, 32, 1, 128 * 128, True, 4),
        (1 << 30, 6, 2, 1 << 20, False, 3),  # at least one head
    ],
)
def test_turns_have_all_heads_once(tokens: int, heads: int, sp: int, state: int, few: bool, turns: int) -> None:
    assert spread.turns_of(tokens, heads, sp, state, few) == turns
    for group in (1, 2, 3):
        for share in (share_of(range(heads // 2), group), share_of(range(heads), group)):
            parts = [spread._turn(share, i, turns, group) for i in range(turns)]
            assert [head for part in parts for head in part.q] == list(share.q)
