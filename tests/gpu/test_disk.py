"""Layer inputs of a GPU in files: copied beside the compute, the same bits back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ds_longft.sequence.disk import CHUNK_BYTES, DiskStore
from tests.unit.sequence.test_disk import PLACES, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device"),
]


@pytest.mark.parametrize("policy", ["full", "sqrt"])
def test_gradients_are_bit_equal_wherever_inputs_wait(tmp_path: Path, policy: str) -> None:
    expected, *others = (gradients(places, policy, tmp_path, torch.device("cuda")) for places in PLACES)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


def test_more_chunks_than_buffers(tmp_path: Path) -> None:
    store, device = DiskStore(str(tmp_path), torch.device("cuda")), "cuda"
    sent = [torch.randn(20 * CHUNK_BYTES // 4 + 77, device=device), torch.randn(5, device=device)]
    found = [torch.empty_like(t) for t in sent]
    store.write("x", sent)
    store.wait(store.read("x", found))
    assert all(torch.equal(a, b) for a, b in zip(sent, found, strict=True))
