"""The attention op over ranks against its definition, in float64, for whatever documents, heads and world hypothesis finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_longft.batch import Documents
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.attention import ulysses_attention
from ds_longft.sequence.recompute import apply_recompute


class Layer(torch.nn.Module):
    """Attention alone, called the way recomputation calls a decoder layer."""

    is_causal = True

    def __init__(self, heads: tuple[int, int], sinks: torch.Tensor | None, **asked: Any) -> None:
        super().__init__()
        self.heads, self.sinks, self.asked = heads, sinks, asked

    def forward(self, qkv: torch.Tensor, **kept: Any) -> torch.Tensor:
        q_heads, kv_heads = self.heads
        q, k, v = (t.transpose(0, 1)[None] for t in qkv.split([q_heads, kv_heads, kv_heads], dim=1))
        return ulysses_attention(self, q, k, v, None, s_aux=self.sinks, **self.asked, **kept)[0][0]


def inputs(seed: int, tokens: int, q_heads: int, kv_heads: int, d: int, sinks: bool) -> list[torch.Tensor]:
    """q, k, v, the gradient of the output, sinks: [S, H, d] float64; the same on every rank."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, h, d) for h in (q_heads, kv_heads, kv_heads, q_heads)] + ([(q_heads,)] if sinks else [])
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def op(
    rank: int, world: int, seed: int, lengths: list[int], q_heads: int, kv_heads: int, d: int, window: int | None,
    softcap: float | None, sinks: bool, recomputed: bool,
) -> Any:  # fmt: skip
    """Output and gradients of this rank's tokens."""
    layout = ParallelLayout.create(world)
    q, k, v, dout, *sink = inputs(seed, sum(lengths), q_heads, kv_heads, d, sinks)
    s = sum(lengths) // world
    mine = slice(rank * s, (rank + 1) * s)
    leaves = [t[mine].clone().requires_grad_() for t in (q, k, v)] + [t.clone().requires_grad_() for t in sink]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    asked = {"documents": Documents(cu, tuple(lengths)), "layout": layout, "sliding_window": window, "softcap": softcap}
    layer = Layer((q_heads, kv_heads), leaves[3] if sink else None, **asked)
    apply_recompute([layer], "keep_attention" if recomputed else "none")
    out = layer(torch.cat(leaves[:3], dim=1))
    grads = torch.autograd.grad(out, leaves, dout[mine])
    if sink and world > 1:
        torch.distributed.all_reduce(grads[3])
    return [out.detach(), *grads]


def definition(
    seed: int,
    lengths: list[int],
    q_heads: int,
    kv_heads: int,
    d: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
) -> list[torch.Tensor]:
    """Output and gradients of all tokens: one dense matrix with a mask of documents, causality and window."""
    q, k, v, dout, *sink = inputs(seed, sum(lengths), q_heads, kv_heads, d, sinks)
    leaves = [t.requires_grad_() for t in (q, k, v, *sink)]
    group = q_heads // kv_heads
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, 1)) * d**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    i = torch.arange(sum(lengths))
    seen = (document[:, None] == document) & (i[:, None] >= i) & (i[:, None] - i < (window or 10**9))
    scores = scores.masked_fill(~seen, -torch.inf)
    if sink:
        scores = torch.cat([scores, sink[0][:, None, None].expand(-1, scores.shape[1], 1)], -1)
    out = torch.einsum("hij,jhd->ihd", scores.softmax(-1)[..., : len(i)], v.repeat_interleave(group, 1))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@st.composite
def cases(draw: st.DrawFn, world: int) -> tuple[Any, ...]:
    """Arguments of `definition` and `op`; the tokens fill the ranks evenly."""
    q_heads = draw(st.integers(world, 12))
    kv_heads = draw(st.sampled_from([n for n in range(1, q_heads + 1) if q_heads % n == 0]))
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=8))
    padding = -sum(lengths) % world
    window = draw(st.none() | st.integers(1, 30))
    softcap = draw(st.none() | st.sampled_from([0.5, 5.0]))
    return (
        draw(st.integers(0, 2**31)), lengths + [padding] * bool(padding), q_heads, kv_heads, draw(st.sampled_from([2, 8])),
        window, softcap, draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_op_equals_its_definition(pools, world):
    pool = pools(world)

    @settings(
        max_examples=60, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(cases(world), st.booleans())
    def check(case: tuple[Any, ...], recomputed: bool) -> None:
        parts = pool.run(op, *case, recomputed)
        whole = [torch.cat(tensors) for tensors in zip(*(p[:4] for p in parts), strict=True)]
        if case[-1]:
            whole.append(parts[0][4])
        for name, ours, truth in zip(("out", "dq", "dk", "dv", "dsinks"), whole, definition(*case), strict=False):
            # Against 1, the inputs' own size, where it is less: dq of documents of one token is 0 but for rounding.
            error = float((ours - truth).norm() / truth.norm().clamp_min(1.0))
            assert error < 1e-10, f"{name} is {error:.1e} off"

    check()
