"""Fused linears against autograd through the plain layers, whichever way the low-rank term is computed."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from ds_longft.sequence import linear
from ds_longft.sequence.linear import LinearGroup, Member, folds

NAMES = ("q_proj", "k_proj", "v_proj")


def layers(outs: tuple[int, ...], ranks: tuple[int, ...], *, inner: int, bias: bool) -> list[nn.Module]:
    """Frozen linears of these widths in float64, with LoRA of these ranks; 0: without."""
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for out, r in zip(outs, ranks, strict=True):
        base = nn.Linear(inner, out, bias=bias, dtype=torch.float64).requires_grad_(False)
        if not r:
            made.append(base)
            continue
        config = LoraConfig(r=r, lora_alpha=3 * r, init_lora_weights=False)
        lora = PeftLinear(base, "default", config, r=r, lora_alpha=3 * r)
        made.append(lora.double())
    return made


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("outs", "ranks"), [((7,), (3,)), ((7,), (8,)), ((9, 4), (3, 5)), ((9, 4, 4), (4, 0, 2)), ((9, 4), (0, 0))]
)
def test_same_as_autograd(
    monkeypatch: pytest.MonkeyPatch, outs: tuple[int, ...], ranks: tuple[int, ...], bias: bool, folded: bool
) -> None:
    asked = []

    def forced(*shape: int) -> bool:
        asked.append(shape)
        return folded and shape[2] > 0

    monkeypatch.setattr(linear, "folds", forced)
    modules = layers(outs, ranks, inner=5, bias=bias)
    members = [m for m in map(Member.of, modules) if m is not None]
    x = torch.randn(1, 11, 5, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for m in modules for p in m.parameters() if p.requires_grad)]
    douts = [torch.randn(1, 11, out, dtype=torch.float64) for out in outs]

    def grads(ys: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(ys, wanted, douts))

    plain = [member.plain(x) for member in members]
    expected = grads(plain)
    LinearGroup(NAMES[: len(outs)], modules, members)
    ours = [module(x) for module in modules]
    for a, b in zip([*ours, *grads(ours)], [*plain, *expected], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if any(ranks):
        assert (11, 5, sum(out for out, r in zip(outs, ranks, strict=True) if r)) in asked


def test_folded_where_it_spares_memory_traffic() -> None:
    assert folds(65_536, 4096, 2 * 14_336)  # gate and up of a Llama-8B, and down's backward pass
    assert folds(65_536, 4096, 14_336)
    assert not folds(65_536, 4096, 4096 + 2 * 1024)  # q, k and v
    assert not folds(65_536, 14_336, 4096)
    assert not folds(1024, 4096, 2 * 14_336)  # few tokens: copying the weights would cost more


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("ranks", [(3, 5), (8, 0)])
def test_without_adapters_as_with_ones_that_add_nothing(
    monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...], folded: bool
) -> None:
    """To the bit: the reference of a preference pair is the policy before its first step."""
    monkeypatch.setattr(linear, "folds", lambda *shape: folded and shape[2] > 0)
    modules = [module.to(torch.bfloat16) for module in layers((48, 32), ranks, inner=509, bias=True)]
    for module in modules:
        if isinstance(module, PeftLinear):
            nn.init.zeros_(module.lora_B["default"].weight)
    LinearGroup(NAMES[:2], modules, [m for m in map(Member.of, modules) if m is not None])
    x = torch.randn(1, 700, 509, dtype=torch.bfloat16)
    policy = [module(x) for module in modules]
    for module in modules:
        if isinstance(module, PeftLinear):
            module.enable_adapters(False)
    for ours, reference in zip(policy, [module(x) for module in modules], strict=True):
        assert torch.equal(ours, reference)
