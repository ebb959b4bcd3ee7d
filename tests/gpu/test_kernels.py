"""Every attention kernel that fits this GPU against float32 `math`: outputs, log-sum-exp, gradients, isolation."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from torch import Tensor

from ds_longft.batch import Documents
from ds_longft.sequence.kernels import KERNELS, AttentionSpec, Job, Kernel, Saved, kernel_by_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MATH = kernel_by_name("math")
NAMES = [kernel.name for kernel in KERNELS if kernel.name not in ("cpu", "math")]
MIXED = (700, 1, 130, 1, 1025, 64, 333)
SHAPES = {  # (query heads, kv heads, head dimension)
    "64, no groups": (4, 4, 64),
    "96, groups of 3": (9, 3, 96),
    "128, groups of 4": (16, 4, 128),
    "128, one kv head": (7, 1, 128),
    "256, groups of 2": (4, 2, 256),
    "512, groups of 4": (8, 2, 512),
}
SPECS = {
    "full": {},
    "window 100": {"window": 100},
    "window 1": {"window": 1},
    "window over all": {"window": 4096},
    "softcap": {"softcap": 20.0},
    "window and softcap": {"window": 200, "softcap": 20.0},
}


BASIC_MASKS = ("full", "window 100", "softcap")


@cache
def fitting(name: str, dtype: torch.dtype, head_dim: int, spec: AttentionSpec) -> Kernel | str:
    """The kernel, or why it refuses this."""
    kernel = kernel_by_name(name)
    reason = kernel.refuses(Job("cuda", dtype, head_dim, spec, torch.cuda.get_device_capability()))
    return kernel if reason is None else reason


def kernel_or_skip(name: str, head_dim: int, spec: AttentionSpec, lengths: tuple[int, ...]) -> Kernel:
    seen = AttentionSpec(spec.scale, spec.window_for(lengths), spec.softcap)
    kernel = fitting(name, torch.bfloat16, head_dim, seen)
    if isinstance(kernel, str):
        pytest.skip(f"{name} {kernel}")
    return kernel


def random_pack(
    lengths: tuple[int, ...], q_heads: int, kv_heads: int, d: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """bf16 q, k, v as views of one wider buffer, dout as a view of another, and the borders."""
    generator = torch.Generator("cuda").manual_seed(len(lengths) + d)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    wide = torch.randn(sum(lengths), q_heads + 2 * kv_heads + 2, d, **options)
    q, k, v, _ = wide.split([q_heads, kv_heads, kv_heads, 2], 1)
    dout = torch.randn(sum(lengths), q_heads + 1, d, **options)[:, 1:]
    return q, k, v, dout, torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def poison(*like: Tensor) -> None:
    """Leave NaN in the freed memory that outputs of these shapes will most likely be given."""
    del_me = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in like for _ in range(3)]
    del del_me


def run(kernel: Kernel, pack: tuple[Tensor, ...], lengths: tuple[int, ...], spec: AttentionSpec) -> list[Tensor]:
    """[out, lse, dq, dk, dv]; the gradient pass reads `out` as a slice of a wider buffer."""
    q, k, v, dout, borders = pack
    poison(q, k, v, q[..., 0].T.float())
    out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    strided_out = torch.cat([out, torch.full_like(out[:, :1], torch.nan)], 1)[:, :-1]
    poison(q, k, v)
    grads = kernel.backward(dout, Saved(q, k, v, strided_out, lse), Documents(borders, tuple(lengths)), spec)
    return [out, lse, *grads]


def assert_close(kernel: Kernel, pack: tuple[Tensor, ...], lengths: tuple[int, ...], spec: AttentionSpec) -> None:
    seen = run(kernel, pack, lengths, spec)
    expected = run(MATH, (*(x.float() for x in pack[:4]), pack[4]), lengths, spec)
    q = pack[0]
    assert seen[0].is_contiguous()
    assert seen[0].dtype == torch.bfloat16
    assert seen[1].dtype == torch.float32
    assert seen[1].shape == (q.shape[1], q.shape[0])
    # with softcap, FlashAttention takes the hardware's approximate tanh: 5e-4 of the cap on each score
    tol, lse_tol = (1e-2, 1e-2) if spec.softcap is None else (3e-2, 5e-2)
    assert float((seen[1] - expected[1]).abs().max()) < lse_tol
    floor = 1e-3 * expected[4].norm()  # of gradients that are nought but for rounding
    for what, x, y in zip(["out", "lse", "dq", "dk", "dv"], seen, expected, strict=True):
        assert x.shape == y.shape, what
        ratio = float((x.float() - y).norm() / torch.maximum(y.norm(), floor))
        assert ratio < tol, f"{kernel.name} {what}: norm of the error is {ratio:.2e} of the norm of the truth"


FULL_SHAPE = "128, groups of 4"
# every mask at one shape, the masks with code of their own at the others: some kernels compile for each pair
CASES = [(shape, mask) for shape in SHAPES for mask in SPECS if shape == FULL_SHAPE or mask in BASIC_MASKS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "mask"), CASES)
def test_a_pack_of_documents(name: str, shape: str, mask: str) -> None:
    q_heads, kv_heads, d = SHAPES[shape]
    spec = AttentionSpec(d**-0.5, **SPECS[mask])
    kernel = kernel_or_skip(name, d, spec, MIXED)
    assert_close(kernel, random_pack(MIXED, q_heads, kv_heads, d), MIXED, spec)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "lengths", [(1,), (2,), (127,), (4096,), (1,) * 5, (3,) * 400], ids=lambda x: f"{len(x)}x{x[0]}"
)
def test_extreme_packs(name: str, lengths: tuple[int, ...]) -> None:
    spec = AttentionSpec(0.1)
    kernel = kernel_or_skip(name, 128, spec, lengths)
    assert_close(kernel, random_pack(lengths, 8, 2, 128), lengths, spec)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_random_documents(name: str, seed: int) -> None:
    draw = random.Random(seed)
    lengths = tuple(
        draw.choice([1, 5, 63, 64, 65, 300, 1000]) + draw.randrange(50) for _ in range(draw.randrange(2, 12))
    )
    spec = AttentionSpec(draw.choice([0.05, 128**-0.5]))
    kernel = kernel_or_skip(name, 128, spec, lengths)
    assert_close(kernel, random_pack(lengths, 16, 4, 128), lengths, spec)


@pytest.mark.parametrize("name", [*NAMES, "math"])
def test_a_changed_token_leaves_other_documents_bit_equal(name: str) -> None:
    """The forward pass. Gradients are summed with atomics on GPUs, so theirs are equal to rounding."""
    spec = AttentionSpec(128**-0.5)
    kernel = kernel_or_skip(name, 128, spec, MIXED)
    pack = random_pack(MIXED, 8, 2, 128)
    before = run(kernel, pack, MIXED, spec)
    for x in pack[:3]:
        x[750] = 2.0  # a token of the third document: tokens 701 to 831
    after = run(kernel, pack, MIXED, spec)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        dim = 1 if i == 1 else 0  # lse is [hq, S]
        others = [torch.cat([x.narrow(dim, 0, 701), x.narrow(dim, 831, x.shape[dim] - 831)], dim) for x in (old, new)]
        if i < 2:
            assert torch.equal(*others)
        else:
            assert float((others[0] - others[1]).float().norm() / others[0].float().norm()) < 1e-2
        assert not torch.equal(old.narrow(dim, 701, 130), new.narrow(dim, 701, 130))


def test_something_other_than_math_fits() -> None:
    """A guard: without it, every test above could be skipped and the file still be green."""
    spec = AttentionSpec(0.1)
    assert any(isinstance(fitting(name, torch.bfloat16, 128, spec), str) is False for name in NAMES)
