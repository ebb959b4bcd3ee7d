"""A gradient is written over a saved tensor only where nothing else reads it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_longft.sequence.linear import fuse_linears
from ds_longft.sequence.mlp import tile_mlp
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.sequence.reuse import ours_alone
from tests.unit.sequence import zoo
from tests.unit.sequence.mlp import Mlp


def asked(share: bool, checkpointed: bool) -> list[bool]:
    """What each backward pass of a function that reads x is told; with `share` two of them read it."""
    told: list[bool] = []

    class Read(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.detach())
            return x * 2

        @staticmethod
        def backward(ctx, dout: Tensor) -> Tensor:
            told.append(ours_alone(*ctx.saved_tensors))
            return dout * 2

    def layer(hidden: Tensor) -> Tensor:
        x = (hidden * 3)[0].transpose(0, 1)  # a view, as queries are
        return Read.apply(x) + Read.apply(x) if share else Read.apply(x)

    hidden = torch.ones(1, 4, 2, requires_grad=True)
    out = checkpoint(layer, hidden, use_reentrant=False) if checkpointed else layer(hidden)
    out.sum().backward()
    return told


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_last_reader_may_write(checkpointed: bool) -> None:
    assert asked(share=False, checkpointed=checkpointed) == [True]
    assert asked(share=True, checkpointed=checkpointed) == [False, True]


def test_not_where_something_keeps_the_memory_or_elements_share_a_place() -> None:
    x = torch.zeros(3, 4)
    assert ours_alone(x)
    kept = x[1:]
    assert not ours_alone(x)
    del kept
    assert ours_alone(x)
    assert not ours_alone(torch.zeros(3, 1).expand(3, 4))


class Layer(nn.Module):
    """`gate` reads the MLP's input after the MLP does; with `twice` the MLP is called again, and the layer ends with it."""

    def __init__(self, gate: bool, twice: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.post_attention_layernorm, self.mlp, self.router = nn.LayerNorm(8), Mlp(), nn.Linear(8, 8)
        self.gate, self.twice = gate, twice
        self.double()

    def forward(self, x: Tensor, **_: object) -> Tensor:
        normed = self.post_attention_layernorm(x)
        out = self.mlp(normed)
        if self.gate:
            out = out * torch.sigmoid(self.router(normed))
        if self.twice:
            out = self.mlp(out.sin())
        return x + out


def gradients(layer: Layer, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]  # type: ignore[list-item]


@pytest.mark.parametrize("policy", ["full", "auto"])
@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize(("gate", "twice"), [(False, False), (True, False), (False, True), (True, True)])
def test_layers_that_read_an_input_or_call_a_linear_twice(
    gate: bool, twice: bool, tile: int | None, policy: str
) -> None:
    """Kept outputs of linears, tiles over the input and the unused down projection, against plain autograd."""
    plain = Layer(gate, twice)
    layer = copy.deepcopy(plain)
    groups = fuse_linears(layer)
    down = next(g for g in groups if g.names == ("down_proj",))
    keep = LayerKeep(0, last=tile_mlp(layer, groups, tile) if tile else down)
    keep.on_device = [g for g in groups if g is not down] if policy == "auto" else []
    apply_recompute([layer], policy, keep=[keep])
    x = torch.randn(1, 10, 8, dtype=torch.float64)
    for seen, true in zip(gradients(layer, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(seen, true, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("model_type", "recompute", "alone"),
    [("llama", "full", True), ("llama", "none", True), ("qwen3", "keep_attention", True), ("diffllama", "full", False)],
)
def test_of_models_the_memory_is_spared_where_it_can_be(
    model_type: str, recompute: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In turns and in tiles: nothing of a Llama's layer outlives its readers, DiffLlama's attentions share q and k."""
    told: list[bool] = []

    def spy(saved: Tensor) -> bool:
        told.append(ours_alone(saved))
        return told[-1]

    monkeypatch.setattr("ds_longft.sequence.attention.ours_alone", spy)
    monkeypatch.setattr("ds_longft.sequence.mlp.ours_alone", spy)
    zoo.ours(zoo.tiny(model_type), zoo.Way(recompute, tile_tokens=7, kv_heads=1))
    assert len(told) >= 3 * 4  # q, k and v, and the MLP's input, of three layers
    assert all(told) == alone
