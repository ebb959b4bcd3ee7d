"""The kernels that run on a CPU against dense float64 attention; the choice among all of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_longft.batch import Documents
from ds_longft.config.run_config import ModelConfig
from ds_longft.errors import ModelError
from ds_longft.sequence.kernels import KERNELS, AttentionSpec, Saved, choose_kernel, kernel_by_name, math_kernel

CPU = torch.device("cpu")


def dense_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Attention with one S x S mask, in float64 and under autograd: (out [S, hq, d], lse [hq, S])."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    token = torch.arange(sum(lengths))
    seen = (document[:, None] == document[None, :]) & (token[None, :] <= token[:, None])
    if spec.window is not None:
        seen &= token[None, :] > token[:, None] - spec.window
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~seen, -math.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def test_the_run_config_knows_the_kernels() -> None:
    known = get_args(ModelConfig.model_fields["kernel"].annotation)
    assert sorted(known) == sorted(["auto", *(kernel.name for kernel in KERNELS)])


def random_pack(
    lengths: list[int], kv_heads: int, group: int, d: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views of one wider buffer, dout as a view of another, and the borders."""
    generator = torch.Generator().manual_seed(seed)
    q_heads, tokens = kv_heads * group, sum(lengths)
    wide = torch.randn(tokens, q_heads + 2 * kv_heads + 1, d, dtype=torch.float64, generator=generator).to(dtype)
    q, k, v, _ = wide.split([q_heads, kv_heads, kv_heads, 1], 1)
    dout = torch.randn(tokens, q_heads + 1, d, dtype=torch.float64, generator=generator).to(dtype)[:, 1:]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return q, k, v, dout, borders


def distance(seen: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    expected = expected.detach()
    return float((seen.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_matches_dense(name: str, inputs: tuple[Tensor, ...], lengths: list[int], spec: AttentionSpec, tol: float):
    q, k, v, dout, borders = inputs
    kernel = kernel_by_name(name)
    before = [x.clone() for x in inputs]
    out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    # the exchange hands `out` back as a slice of a wider buffer too
    strided_out = torch.cat([out, torch.full_like(out[:, :1], math.nan)], 1)[:, :-1]
    grads = kernel.backward(dout, Saved(q, k, v, strided_out, lse), Documents(borders, tuple(lengths)), spec)

    leaves = [x.detach().double().clone().requires_grad_() for x in (q, k, v)]
    dense_out, dense_lse = dense_attention(*leaves, lengths, spec)
    dense_grads = torch.autograd.grad(dense_out, leaves, dout.double())

    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert distance(out, dense_out) < tol
    assert (
        float((lse.double() - dense_lse.detach()).abs().max()) < max(tol, 1e-6 if q.dtype != torch.float64 else 0) * 20
    )
    # a pack of one-token documents has no q and k gradient at all: compare with the size of dv then
    floor = 1e-3 * dense_grads[2].norm()
    for seen, expected in zip(grads, dense_grads, strict=True):
        assert seen.shape == expected.shape
        assert (seen.double() - expected).norm() <= tol * torch.maximum(expected.norm(), floor)
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(x, y)


packs = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=5),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "d": st.sampled_from([4, 8, 16]),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pack=packs,
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.sampled_from([0.5, 30.0]),
    scores_per_chunk=st.sampled_from([1, 37, 1 << 24]),
)
def test_math_is_dense_attention(pack, window, softcap, scores_per_chunk):
    spec = AttentionSpec(pack["d"] ** -0.5, window, softcap)
    inputs = random_pack(**pack, dtype=torch.float64)
    with mock.patch.object(math_kernel, "SCORES_PER_CHUNK", scores_per_chunk):
        assert_matches_dense("math", inputs, pack["lengths"], spec, tol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pack=packs, scale=st.sampled_from([0.1, 1.0]))
def test_cpu_is_dense_attention(pack, scale):
    inputs = random_pack(**pack, dtype=torch.float64)
    assert_matches_dense("cpu", inputs, pack["lengths"], AttentionSpec(scale), tol=1e-12)


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(name, dtype, tol):
    lengths = [70, 1, 129]
    inputs = random_pack(lengths, kv_heads=2, group=3, d=16, dtype=dtype)
    assert_matches_dense(name, inputs, lengths, AttentionSpec(0.25), tol)


@pytest.mark.parametrize("name", ["cpu", "math"])
def test_one_token_documents_see_themselves(name):
    lengths = [1, 1, 1]
    q, k, v, dout, borders = random_pack(lengths, kv_heads=2, group=2, d=8, dtype=torch.float32)
    spec = AttentionSpec(0.5)
    out, lse = kernel_by_name(name).forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    assert torch.equal(out, v.repeat_interleave(2, 1))
    dq, dk, dv = kernel_by_name(name).backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
    assert float(dq.abs().max()) < 1e-6
    assert float(dk.abs().max()) < 1e-6
    torch.testing.assert_close(dv, dout.unflatten(1, (2, 2)).sum(2))


@pytest.mark.parametrize("name", ["cpu", "math"])
def test_a_changed_token_leaves_other_documents_bit_equal(name):
    lengths = [17, 40, 1, 23]
    spec = AttentionSpec(0.3, window=11 if name == "math" else None)
    q, k, v, dout, borders = random_pack(lengths, kv_heads=2, group=2, d=8, dtype=torch.float32)
    kernel = kernel_by_name(name)

    def run() -> list[Tensor]:
        out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
        return [out, lse.T, *kernel.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)]

    before = run()
    q[20], k[20], v[20] = 3.0, -2.0, 5.0  # a token of the second document
    for old, new in zip(before, run(), strict=True):
        assert torch.equal(old[:17], new[:17])
        assert torch.equal(old[57:], new[57:])
        assert not torch.equal(old[17:57], new[17:57])


@pytest.mark.parametrize("name", ["cpu", "math"])
def test_every_output_is_written(name):
    lengths = [9, 1, 30]
    q, k, v, dout, borders = random_pack(lengths, kv_heads=1, group=2, d=8, dtype=torch.float32)
    kernel, spec = kernel_by_name(name), AttentionSpec(0.3)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
        grads = kernel.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(x.isfinite().all()) for x in (out, lse, *grads))


@pytest.mark.parametrize(("length", "heads", "window"), [(32768, 16, None), (32768, 32, 4096), (7, 1, None), (1, 4, 1)])
def test_math_never_holds_all_scores(length, heads, window):
    chunks = list(math_kernel._chunks(length, heads, window))
    assert chunks[0][0].start == 0
    assert chunks[-1][0].stop == length
    assert all(a.stop == b.start for (a, _), (b, _) in pairwise(chunks))
    assert all(rows.stop == seen.stop for rows, seen in chunks)
    sizes = [(rows.stop - rows.start) * (seen.stop - seen.start) for rows, seen in chunks]
    assert heads * max(sizes) <= 2 * math_kernel.SCORES_PER_CHUNK


@pytest.mark.parametrize(("window", "expected"), [(None, None), (12, None), (11, None), (10, 10), (1, 1)])
def test_a_window_as_wide_as_the_longest_document_is_none(window, expected):
    assert AttentionSpec(1.0, window).window_for([3, 11, 7]) == expected


@pytest.mark.parametrize("bad", [{"window": 0}, {"softcap": 0.0}, {"softcap": -1.0}])
def test_impossible_specs_are_refused(bad):
    with pytest.raises(ModelError, match=next(iter(bad))):
        AttentionSpec(1.0, **bad)


def choose(name="auto", device=CPU, dtype=torch.float32, head_dim=64, spec=None, lengths=(100, 28)):
    return choose_kernel(
        name, device=device, dtype=dtype, heads=8, head_dim=head_dim, spec=spec or AttentionSpec(0.125), lengths=lengths
    )


def test_auto_on_a_cpu():
    assert choose()[0].name == "cpu"
    assert choose(dtype=torch.float64)[0].name == "cpu"
    kernel, reason = choose(spec=AttentionSpec(0.125, window=64))
    assert kernel.name == "math"
    assert "cpu has no sliding window (asked for 64)" in reason
    assert choose(spec=AttentionSpec(0.125, window=100))[0].name == "cpu"  # no document is longer than the window
    assert choose(spec=AttentionSpec(0.125, softcap=50.0))[0].name == "math"


def test_a_kernel_that_does_not_fit_is_refused_with_those_that_do():
    with pytest.raises(ModelError, match=r"flash-attn-4 runs on cuda, not on cpu.*fit.*: cpu, math;"):
        choose("flash-attn-4")
    with pytest.raises(ModelError, match=r"cpu has no softcap \(asked for 50.0\).*: math;"):
        choose("cpu", spec=AttentionSpec(0.125, softcap=50.0))
    assert choose("math")[0].name == "math"


def test_an_unknown_kernel_is_refused_with_the_known_names():
    for call in (lambda: choose("flash"), lambda: kernel_by_name("flash")):
        with pytest.raises(ModelError, match=r"'flash', which is no kernel.*flash-attn-4, .*, math"):
            call()


def test_names_are_unique_and_find_their_kernel():
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    assert all(kernel_by_name(kernel.name) is kernel for kernel in KERNELS)
