"""Gated norms: what the kernels are told of each class is what the class computes, in tiles as at once."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ds_longft.sequence.state import work_in_pieces
from ds_longft.sequence.state.families import state_layers
from ds_longft.sequence.state.gated_norm import GATED_FIRST, OF_EACH_HEAD, gated_norm
from tests.distributed.models import tiny_config
from tests.distributed.test_state_exact import FAMILIES

NORMS = {
    "Qwen3NextRMSNormGated": ("qwen3_next", (128,)),
    "Qwen3_5RMSNormGated": ("qwen3_5", (128,)),
    "Qwen3_5MoeRMSNormGated": ("qwen3_5_moe", (64,)),
    "OlmoHybridRMSNormGated": ("olmo_hybrid", (96,)),
    "KimiLinearRMSNormGated": ("kimi_linear", (64,)),
    "NemotronHRMSNormGated": ("nemotron_h", (768, 256)),
    "Zamba2RMSNormGated": ("zamba2", (768, 256)),
    "GraniteMoeHybridRMSNormGated": ("granitemoehybrid", (768, 768)),
    "BambaRMSNormGated": ("bamba", (768, 96)),
}
"""Class -> model type, features of its weight and of its groups."""

HERE = [
    name
    for name, (model_type, _) in NORMS.items()
    if hasattr(import_module(f"transformers.models.{model_type}.modeling_{model_type}"), name)
]
"""Those that this transformers has: Nemotron-H's was Zamba2's in 5.17."""


def made_norm(name: str) -> Any:
    """One with random weights, float32."""
    model_type, features = NORMS[name]
    of = getattr(import_module(f"transformers.models.{model_type}.modeling_{model_type}"), name)
    norm = of(*(features if "group_size" in signature(of).parameters else features[:1]), eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    return norm


def output_and_gradients(norm: Any, out: Tensor, z: Tensor, above: Tensor) -> list[Tensor]:
    """Of the norm: its output, then what `above` gives for out, z and the weight."""
    leaves = [t.detach().clone().requires_grad_() for t in (out, z)]
    made = gated_norm(norm, *leaves)
    return [made.detach(), *torch.autograd.grad(made, [*leaves, norm.weight], above.to(made.dtype))]


def test_every_class_is_tried() -> None:
    assert set(NORMS) == OF_EACH_HEAD | GATED_FIRST


@pytest.mark.parametrize("name", FAMILIES)
def test_the_norm_of_every_family_has_a_kernel(name: str) -> None:
    """A class under another name would be right, and slow without a word. Falcon-H1's is left as it is written."""
    model_type, changes = FAMILIES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
    norms = {type(module).__name__ for _, mixer in state_layers(model) for module in mixer.modules()}
    gated = {norm for norm in norms if norm.endswith("NormGated")}
    assert gated <= OF_EACH_HEAD | GATED_FIRST | {"FalconH1RMSNormGated"}


@pytest.mark.parametrize("name", HERE)
def test_the_formula_and_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels compute: by class, and by the attributes that they read."""
    torch.manual_seed(0)
    norm = made_norm(name).double()
    out, z, above = (torch.randn(7, 768, dtype=torch.float64) for _ in range(3))

    def formula(out: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        if name in OF_EACH_HEAD:
            x = out.view(7, -1, len(weight))
            gate = z.sigmoid() if norm.activation == "sigmoid" else z * z.sigmoid()
            return (x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * weight).view(7, -1) * gate
        x = (out * z * z.sigmoid()).view(7, -1, getattr(norm, "group_size", out.shape[-1]))
        return (x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()).view(7, -1) * weight

    leaves = [t.detach().clone().requires_grad_() for t in (out, z, norm.weight)]
    made = formula(*leaves)
    expected = [made.detach(), *torch.autograd.grad(made, leaves, above)]
    for tile in (7, 3):
        monkeypatch.setattr(work_in_pieces, "TILE_TOKENS", tile)
        for wanted, found in zip(expected, output_and_gradients(norm, out, z, above), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # the modules norm in float32
