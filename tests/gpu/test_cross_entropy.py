"""The loss kernel against float64: values, gradients, weights, rows of a wider buffer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 33), (7, 8192), (64, 8193), (513, 128256), (0, 100)])
def test_values_and_gradients(dtype: torch.dtype, rows: int, vocab: int) -> None:
    from ds_longft.sequence.kernels.cross_entropy import cross_entropy_

    torch.manual_seed(rows)
    wide = (5 * torch.randn(rows, vocab + 8, device="cuda")).to(dtype)
    targets = torch.randint(vocab, (rows,), device="cuda")
    weights = torch.rand(rows, device="cuda")
    if rows > 3:
        wide[3, targets[3]] = 60.0  # a token that is certain: its gradient is a small difference
        weights[2] = 0.0
    logits = wide[:, :vocab]
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none") * weights.double()
    losses.sum().backward()
    quiet = cross_entropy_(logits.clone(), targets, weights, gradient=False)
    found = cross_entropy_(logits, targets, weights)
    assert torch.equal(quiet, found)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=2e-6, atol=2e-6)
    tolerance = 4e-3 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(logits.double(), exact.grad, rtol=tolerance, atol=1e-7)


def test_nothing_beside_the_rows_is_written_and_nan_is_seen() -> None:
    from ds_longft.sequence.kernels.cross_entropy import cross_entropy_

    wide = torch.zeros(2, 40, device="cuda")
    wide[1, 5] = torch.nan
    losses = cross_entropy_(wide[:, :33], torch.tensor([0, 1], device="cuda"), torch.ones(2, device="cuda"))
    assert float(losses[0]) == pytest.approx(torch.tensor(33.0).log().item())
    assert torch.isnan(losses[1])
    assert not wide[:, 33:].any()
