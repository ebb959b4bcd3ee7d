"""What a checkpointed layer hands to torch."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_longft.errors import ModelError
from ds_longft.sequence import recompute
from ds_longft.sequence.recompute import apply_recompute


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, **_: object) -> Tensor:
        return x + self.drop(x.tanh()).sin()


@pytest.mark.parametrize("policy", ["full", "every_k"])
def test_torch_sees_the_device_whose_random_state_it_restores(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for it among the positional arguments; the hidden states themselves are not there."""
    seen: list[tuple[Any, ...]] = []

    def spy(function: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((*args, kwargs["preserve_rng_state"]))
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(recompute, "checkpoint", spy)
    layers = [Layer() for _ in range(4)]
    apply_recompute(layers, policy, every=2)
    out = torch.zeros(1, 6, 4, device="meta", requires_grad=True)
    for layer in layers:
        out = layer(out)
    assert len(seen) >= 2
    for *args, preserve in seen:
        assert preserve
        assert any(isinstance(a, Tensor) and a.device.type == "meta" for a in args)


@pytest.mark.parametrize("between", [1, 2])
def test_a_model_that_computes_between_its_layers_has_no_segments(between: int) -> None:
    """Layers of a segment but the last only hand their input on: what the model made of that went into the next one."""
    layers = [Layer() for _ in range(4)]
    apply_recompute(layers, "every_k", every=2)
    out = torch.zeros(1, 6, 4, requires_grad=True)
    with contextlib.nullcontext() if between == 2 else pytest.raises(ModelError, match="between its decoder layers"):
        for i, layer in enumerate(layers):
            out = layer(out)
            if i + 1 == between:  # behind a whole segment it is seen by the next one
                out = out * 2
