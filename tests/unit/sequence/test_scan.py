"""Mamba-1's scan in pieces and rows against a token at a time, and its gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_longft.sequence.state import scan

CHANNELS, FEATURES = 3, 4


def one_by_one(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, lengths: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """The definition: each document by itself, token by token."""
    outs, states, first = [], [], 0
    for n in lengths:
        state = torch.zeros_like(a)
        for t in range(first, first + n):
            state = torch.exp(dt[t, :, None] * a) * state + (dt[t] * x[t])[:, None] * b[t]
            outs.append(state @ c[t])
        states.append(state)
        first += n
    return torch.stack(outs), states


def drawn(tokens: int) -> list[Tensor]:
    torch.manual_seed(tokens)
    x, dt = torch.randn(2, tokens, CHANNELS, dtype=torch.float64).unbind()
    b, c = torch.randn(2, tokens, FEATURES, dtype=torch.float64).unbind()
    a = -3 * torch.rand(CHANNELS, FEATURES, dtype=torch.float64)
    return [t.requires_grad_() for t in (x, dt.abs().detach(), a, b, c)]


def check(lengths: list[int]) -> None:
    given, cu = drawn(sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)
    inside = torch.ones(sum(lengths), dtype=torch.bool)
    inside[cu[:-1]] = False
    out, states = scan.selective_scan(*given, inside, cu[1:] - 1)
    wanted, behind = one_by_one(*given, lengths)
    dout = torch.randn_like(wanted)
    assert torch.allclose(out, wanted, rtol=1e-11, atol=1e-12)
    assert torch.allclose(states, torch.stack(behind), rtol=1e-11, atol=1e-12)
    ours, theirs = (torch.autograd.grad(t, given, dout) for t in (out, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm()) < 1e-10 * float(other.norm()) + 1e-12


@given(st.lists(st.integers(1, 23), min_size=1, max_size=6), st.integers(1, 40))
def test_any_lengths_and_pieces(lengths: list[int], piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "PIECE_TOKENS", piece)
        check(lengths)


def test_documents_longer_than_a_piece() -> None:
    check([scan.PIECE_TOKENS + 100, 1, 700])


def test_a_state_that_fades_to_nothing() -> None:
    """Products of decays become zero, and nothing is divided by them."""
    tokens = 200
    x, dt, a, b, c = drawn(tokens)
    inside = torch.arange(tokens) > 0
    out, _ = scan.selective_scan(x, dt + 400, a - 1, b, c, inside, inside.nonzero()[:0, 0])
    grads = torch.autograd.grad(out.sum(), (x, dt, a, b, c))
    assert all(torch.isfinite(t).all() for t in (out, *grads))
    assert torch.allclose(out, (dt + 400) * x * (b * c).sum(1, keepdim=True))
