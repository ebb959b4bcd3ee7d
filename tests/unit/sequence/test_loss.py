"""The loss of an output head in bf16, frozen and trained, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_longft.config.run_config import LoraConfig
from ds_longft.errors import ModelError
from ds_longft.model.lora import add_lora
from ds_longft.sequence.linear import Member
from ds_longft.sequence.loss import ChunkedHead, DocumentRows, WeightedCrossEntropy, token_loss_sum
from tests.distributed.models import tiny_config, tiny_model


@pytest.mark.parametrize("scale", [8 / 100_000, 5 / 61_000])
def test_the_scale_of_the_loss_is_not_rounded_apart(scale: float) -> None:
    """bf16 holds 8 / 100,000 as 1.0014 of it: every gradient was as much too long. Products are rounded one by one."""
    torch.manual_seed(0)
    head = nn.Linear(64, 512, bias=False).bfloat16().requires_grad_(False)
    targets, weights = torch.randint(512, (256,)), torch.ones(256)

    def gradient(factor: float) -> torch.Tensor:
        hidden = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        loss = token_loss_sum(Member(head, None), hidden, targets, weights, WeightedCrossEntropy(), 100)
        (loss * factor).backward()
        return hidden.grad.double()

    whole, scaled = gradient(1.0), gradient(scale)
    length = float((scaled * whole).sum() / (whole * whole).sum())
    assert length == pytest.approx(scale, rel=2e-4)


@pytest.mark.parametrize("chunks", [1, 128])
@pytest.mark.parametrize("documents", [None, 3])
def test_the_gradient_of_a_trained_head_is_rounded_once(chunks: int, documents: int | None) -> None:
    """Summed in bf16 over 128 chunks it was 1.4 % off, five times what one rounding costs."""
    torch.manual_seed(0)
    rows, scale = 1024, 8 / 100_000
    head = nn.Linear(64, 96).bfloat16()
    adapter = nn.Linear(64, 4, bias=False).bfloat16(), nn.Linear(4, 96, bias=False).bfloat16(), 2.0
    targets, weights = torch.randint(96, (rows,)), torch.rand(rows)
    hidden = torch.randn(rows, 64).bfloat16().requires_grad_()
    of_row = torch.randint(documents or 1, (rows,))
    factors = torch.rand(documents or 1, dtype=torch.float64) * scale

    member, of = Member(head, adapter), DocumentRows(of_row, documents) if documents else None
    loss = token_loss_sum(member, hidden, targets, weights, WeightedCrossEntropy(), rows // chunks, of)
    (loss * factors.squeeze()).sum().backward()

    exact = [t.detach().double().requires_grad_() for t in (hidden, *member.tensors()) if t is not None]
    x, w, bias, a, b = exact
    logits = x @ w.t() + bias + x @ a.t() @ b.t() * 2.0
    losses = nn.functional.cross_entropy(logits, targets, reduction="none") * weights
    (losses * factors[of_row]).sum().backward()
    for seen, true in zip((hidden, *member.tensors()), exact, strict=True):
        assert seen is not None
        assert float((seen.grad - true.grad).norm() / true.grad.norm()) < 5e-3, true.shape


def squared_normalizer(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, *, gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """weights * log(sum(exp(logits)))^2, known as z-loss; targets are not read."""
    with torch.enable_grad():
        x = logits.detach().requires_grad_()
        losses = torch.logsumexp(x, dim=1) ** 2 * weights
        return losses.detach(), torch.autograd.grad(losses.sum(), x)[0] if gradient else None


@pytest.mark.parametrize("trained", [False, True])
def test_another_token_loss_is_a_function(trained: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 12, bias=False).double().requires_grad_(trained)
    targets, weights = torch.zeros(50, dtype=torch.int64), torch.rand(50).double()
    hidden = torch.randn(50, 8).double().requires_grad_()
    inputs = [hidden, head.weight] if trained else [hidden]
    loss = token_loss_sum(Member(head, None), hidden, targets, weights, squared_normalizer, 7)
    truth = (torch.logsumexp(head(hidden), dim=1) ** 2 * weights).sum()
    torch.testing.assert_close(loss, truth)
    for seen, true in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(truth, inputs), strict=True):
        torch.testing.assert_close(seen, true)


def test_a_head_with_dora_is_refused_by_name() -> None:
    config = tiny_config("llama")
    model = add_lora(
        tiny_model(config, attn="eager", dtype=torch.float32), LoraConfig(targets=["lm_head"], dora=True), seed=0
    )
    with pytest.raises(ModelError, match=r"adapters on the output head have dropout or DoRA.*lm_head.*lora.dora"):
        ChunkedHead.install(model)
