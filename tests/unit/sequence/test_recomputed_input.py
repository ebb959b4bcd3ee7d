"""The input of the first linears is made again: same gradients, and the norm's output is not kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_longft.sequence.linear import fuse_linears
from ds_longft.sequence.recomputed_input import recompute_first_input


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n, bias=False) for n in (8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x) * self.v_proj(x)], -1)


class Layer(nn.Module):
    """`between`: something stands between the norm and the linears."""

    def __init__(self, between: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input_layernorm, self.self_attn, self.between = nn.LayerNorm(8), Attention(), between
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        return self.self_attn(normed * 2 if self.between else normed)


def run(layer: Layer) -> tuple[list[Tensor], list[Tensor]]:
    """(gradients of input and weights, tensors that autograd kept for the linears)."""
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    torch.manual_seed(1)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = layer(x)
    out.pow(2).sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())], kept  # type: ignore[list-item]


def ours(between: bool) -> tuple[list[Tensor], list[Tensor], Tensor]:
    layer = Layer(between)
    outputs: list[Tensor] = []
    layer.input_layernorm.register_forward_hook(lambda module, args, out: outputs.append(out))
    group = next(g for g in fuse_linears(layer) if "q_proj" in g.names)
    group.recomputed_input = recompute_first_input(layer)
    assert group.recomputed_input is not None
    grads, kept = run(layer)
    assert group.recomputed_input._last is None, "input and output are held after the call"
    return grads, kept, outputs[0]


def test_same_gradients_and_the_norms_output_is_not_kept() -> None:
    grads, kept, output = ours(between=False)
    for a, b in zip(grads, run(Layer())[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not any(t.data_ptr() == output.data_ptr() for t in kept)


def test_what_the_norm_did_not_make_is_kept() -> None:
    grads, kept, output = ours(between=True)
    for a, b in zip(grads, run(Layer(between=True))[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert any(t.shape == output.shape and torch.equal(t, output * 2) for t in kept)


def test_the_output_is_known_without_its_graph_but_not_once_written_over() -> None:
    layer = Layer()
    remade = recompute_first_input(layer)
    assert remade is not None
    x = torch.zeros(2, 8, dtype=torch.float64)
    assert remade.source_of(layer.input_layernorm(x).detach()) is x
    out = layer.input_layernorm(x).detach()
    assert remade.source_of(out.mul_(2)) is None
    layer.input_layernorm(x)
    assert remade.source_of(out) is None


def test_a_layer_without_a_norm_at_its_entrance() -> None:
    assert recompute_first_input(nn.Sequential(nn.Linear(2, 2))) is None
