"""`train.deterministic`: kernels give the same gradients to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ds_longft.batch import Documents
from ds_longft.sequence.kernels import KERNELS, AttentionSpec, Job, Saved, kernel_by_name
from tests.gpu.test_kernels import random_pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NAMES = [kernel.name for kernel in KERNELS if kernel.name != "cpu"]
CASES = {
    "one long": ((70000,), None),
    "one long, window": ((70000,), 1000),
    "long and short": ((40000, 20000, 5, 33000), None),
    "short": ((4096,) * 8, None),
    "tiny": ((700, 1, 130, 1, 1025), None),
}


@pytest.fixture
def _switched_on() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_switched_on")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lengths", "window"), CASES.values(), ids=CASES)
def test_gradients_repeat_to_the_bit(name: str, lengths: tuple[int, ...], window: int | None) -> None:
    if name == "math" and max(lengths) > 5000:
        pytest.skip("too slow for this length")
    kernel, spec = kernel_by_name(name), AttentionSpec(128**-0.5, window, None, True)
    reason = kernel.refuses(Job("cuda", torch.bfloat16, 128, spec, torch.cuda.get_device_capability()))
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    q, k, v, dout, borders = random_pack(lengths, 8, 2, 128)
    out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    first = kernel.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
    for _ in range(2):
        again = kernel.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
        assert [torch.equal(a, b) for a, b in zip(first, again, strict=True)] == [True] * 3
    reference = kernel_by_name("varlen")  # nothing to build; checked against float32 itself
    usual_out, usual_lse = reference.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    usual = reference.backward(dout, Saved(q, k, v, usual_out, usual_lse), Documents(borders, tuple(lengths)), spec)
    for a, b in zip(first, usual, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2
