"""Which MLPs are tiled: down(act(gate(x)) * up(x)) and down(act(up(x))), by whatever kernel, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ds_longft.train.install import fuse_and_tile
from tests.distributed.models import tiny_config, tiny_model

Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def by_another_kernel(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """As liger binds its own to the module: another exp, another rounding."""
    gate = mlp.gate_proj(x).double()
    return mlp.down_proj((gate / (1 + torch.exp2(-gate * 1.4426950))).to(x.dtype) * mlp.up_proj(x))


def with_limits(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x).clamp(max=7)) * mlp.up_proj(x))


def with_a_limit(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.up_proj(x)).clamp(max=7))


def with_dropout(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return F.dropout(mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)), 0.1, mlp.training)


@pytest.mark.parametrize(
    ("forward", "tiled"), [(None, True), (by_another_kernel, True), (with_limits, False), (with_dropout, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_tiled(forward: Forward | None, tiled: bool, dtype: torch.dtype) -> None:
    layer = tiny_model(tiny_config("llama"), attn="eager", dtype=dtype).eval().model.layers[0]
    if forward is not None:
        layer.mlp.forward = MethodType(forward, layer.mlp)
    state = torch.random.get_rng_state()
    assert (fuse_and_tile(layer, 0, 7).tiled is not None) == tiled
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not layer.mlp.training


def test_an_activation_with_weights_is_not_tiled() -> None:
    """Apertus: their gradients would be lost."""
    layer = tiny_model(tiny_config("apertus"), attn="eager", dtype=torch.float32).model.layers[0]
    assert list(layer.mlp.act_fn.parameters())
    assert fuse_and_tile(layer, 0, 7).tiled is None


@pytest.mark.parametrize(("forward", "tiled"), [(None, True), (with_a_limit, False)])
def test_an_mlp_without_a_gate(forward: Forward | None, tiled: bool) -> None:
    config = tiny_config("nemotron_h", layers_block_type=["mlp"], num_hidden_layers=1)
    layer = tiny_model(config, attn="eager", dtype=torch.float32).eval().model.layers[0]
    if forward is not None:
        layer.mixer.forward = MethodType(forward, layer.mixer)
    x = torch.randn(1, 20, config.hidden_size)
    wanted = layer.mixer(x)
    assert (fuse_and_tile(layer, 0, 7).tiled is not None) == tiled
    assert torch.allclose(layer.mixer(x), wanted, rtol=1e-5, atol=1e-6)
