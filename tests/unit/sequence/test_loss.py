"""The loss of a frozen output head in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_longft.sequence.linear import Member
from ds_longft.sequence.loss import weighted_nll


@pytest.mark.parametrize("scale", [8 / 100_000, 5 / 61_000])
def test_the_scale_of_the_loss_is_not_rounded_apart(scale: float) -> None:
    """bf16 holds 8 / 100,000 as 1.0014 of it: every gradient was as much too long. Products are rounded one by one."""
    torch.manual_seed(0)
    head = nn.Linear(64, 512, bias=False).bfloat16().requires_grad_(False)
    targets, weights = torch.randint(512, (256,)), torch.ones(256)

    def gradient(factor: float) -> torch.Tensor:
        hidden = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        loss = weighted_nll(Member(head, None), hidden, targets, weights, lambda logits: logits, 100)
        (loss * factor).backward()
        return hidden.grad.double()

    whole, scaled = gradient(1.0), gradient(scale)
    length = float((scaled * whole).sum() / (whole * whole).sum())
    assert length == pytest.approx(scale, rel=2e-4)
