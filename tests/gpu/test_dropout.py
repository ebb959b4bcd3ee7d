"""Dropout on a GPU: a layer that is computed again drops what it dropped the first time, whatever is kept of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_longft.sequence.kept import HostStore
from ds_longft.sequence.recompute import LayerKeep, apply_recompute

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.masks = nn.Dropout(0.5), []

    def forward(self, x: Tensor, scale: Tensor | None = None, **_: object) -> Tensor:
        out = self.drop(x.tanh())
        self.masks.append((out == 0).cpu())
        return x + out.sin()


@pytest.mark.parametrize("policy", ["full", "keep_attention", "every_k", "sqrt"])
@pytest.mark.parametrize("host", [False, True])
def test_the_same_mask_again(policy: str, host: bool) -> None:
    device = torch.device("cuda")
    layers = [Layer().to(device) for _ in range(4)]
    store = HostStore(device)
    keeps = [LayerKeep(i, store=store, input="host" if host else "device", attention="nowhere") for i in range(4)]
    apply_recompute(layers, policy, every=2, keep=keeps)
    x = torch.randn(1, 64, 8, device=device, requires_grad=True)
    out = x
    for layer in layers:
        out = layer(out)
    out.sum().backward()
    for layer in layers:
        first, *again = layer.masks
        assert again
        assert all(torch.equal(first, mask) for mask in again)
        assert 0.3 < first.float().mean() < 0.7
