"""The norm behind a recurrence, with its gate: flash-linear-attention's kernels on GPUs, else the module's own forward.

transformers writes it operation by operation in float32, which moves 66 bytes an element forward and 137 backward; the
kernels keep float32 to themselves and move 10 and 20, with what `by_tiles` copies. Of a step of 131,072 tokens with a
Qwen3.5-like 8B the difference is 0.9 s of 20, by these counts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ds_longft.sequence.state.recurrence import on_fla
from ds_longft.sequence.state.work_in_pieces import by_tiles

OF_EACH_HEAD = {
    "Qwen3NextRMSNormGated",
    "Qwen3_5RMSNormGated",
    "Qwen3_5MoeRMSNormGated",
    "OlmoHybridRMSNormGated",
    "KimiLinearRMSNormGated",
}
"""The features of a head are normed with one weight for all heads, then gated."""

GATED_FIRST = {
    "NemotronHRMSNormGated",
    "Zamba2RMSNormGated",  # Nemotron-H's in transformers 5.17
    "GraniteMoeHybridRMSNormGated",
    "BambaRMSNormGated",
}
"""Gated with SiLU, then normed in groups of `group_size` features; those that name none: of all."""


def gated_norm(norm: Any, out: Tensor, z: Tensor) -> Tensor:
    """`out` [s, C] of a recurrence and its gate `z` [s, C] -> [s, C], some tokens at a time.

    Not by the module's call: of tiles there are more on a longer pack, and ZeRO-3 counts calls.
    """
    return by_tiles(partial(_normed, norm), list(norm.parameters()), out, z)


def _normed(norm: Any, out: Tensor, z: Tensor) -> Tensor:
    kernel, name = on_fla(out), type(norm).__name__
    if name in OF_EACH_HEAD:
        heads, gate = (t.reshape(-1, len(norm.weight)) for t in (out, z))  # [tokens H, V]
        if kernel:
            from fla.modules.norm.fused_norm_gate import rms_norm_gated

            normed = rms_norm_gated(heads, gate, norm.weight, None, norm.activation, eps=norm.variance_epsilon)
        else:
            normed = norm.forward(heads, gate)
        return normed.view(len(out), -1)
    if name in GATED_FIRST and kernel:
        from fla.modules.norm.layernorm_gated import rmsnorm_fn

        grouped = {"group_size": getattr(norm, "group_size", None), "norm_before_gate": False}
        return rmsnorm_fn(out, norm.weight, None, z, norm.variance_epsilon, **grouped)
    return norm.forward(out[None], z[None])[0]
