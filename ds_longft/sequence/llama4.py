"""What Llama 4 does otherwise: queries scaled by a token's position, and experts whose inputs are scaled.

Layers without RoPE scale the queries of far tokens ("temperature tuning", arXiv 2501.19399). The model takes a
token's place in what it is given, here a slice of a pack, for its position. So attention does it, by documents.

The router's weight scales what goes into an expert, not what comes out, and the model's own forward sends every token
through every expert, the others' as zeros: 16 or 128 times the operations, and as many copies of the tokens. Here the
scaled tokens go to their own experts, which `experts.Experts` groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_longft.batch import Documents


@dataclass(frozen=True)
class Temperature:
    """Queries at position p are multiplied by 1 + scale * ln(1 + floor((p + 1) / floor_tokens))."""

    floor_tokens: float
    scale: float

    def tuned(self, query: Tensor, documents: Documents, sp_rank: int) -> Tensor:
        """query [1, H, s, d] of rank `sp_rank`'s slice -> the same, scaled in float32."""
        s, borders = query.shape[2], documents.cu_seqlens
        tokens = torch.arange(s, device=query.device, dtype=borders.dtype) + sp_rank * s  # [s], in the pack
        starts = borders[torch.searchsorted(borders, tokens, right=True) - 1]
        return self.tuned_at(query, tokens - starts)

    def tuned_at(self, query: Tensor, positions: Tensor) -> Tensor:
        """query [1, H, s, d] at positions [s] of its texts -> the same, scaled in float32."""
        factor = 1 + self.scale * torch.log1p(torch.floor((positions.float() + 1) / self.floor_tokens))
        return (query * factor[:, None]).to(query.dtype)


def take_over_temperatures(model: nn.Module) -> None:
    """Have attention scale the queries of layers that do so by position. Again, it changes nothing."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if tunes_by_place(module):
            module.query_temperature = Temperature(module.floor_scale, module.attn_scale)
            module.attn_temperature_tuning = False


def tunes_by_place(module: Any) -> bool:
    """Whether an attention scales its queries itself."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not module.use_rope


def route_inputs(layer: nn.Module) -> None:
    """Have a decoder layer's tokens go to their own experts. Experts with adapters keep the model's forward."""
    for module in layer.modules():
        if type(module).__name__ == "Llama4TextMoe" and type(module.experts).__name__ == "Llama4TextExperts":
            experts: Any = module.experts
            experts.has_gate, experts.has_bias, experts.is_transposed = True, False, True
            experts._apply_gate = partial(_gated, experts.act_fn)
            module.forward = partial(_routed, module)


def _gated(activation: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * activation(gate)


def _routed(moe: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [1, s, D] -> [s, D], and the router's logits."""
    x = x.reshape(-1, x.shape[-1])  # [s, D]
    scores, logits = moe.router(x)  # [s, E], zeros but for the chosen ones
    weights, index = scores.topk(moe.top_k, dim=-1)  # [s, k]
    rows = x.repeat_interleave(moe.top_k, 0) * weights.reshape(-1, 1)  # [s k, D]
    routed = moe.experts(rows, index.reshape(-1, 1), torch.ones_like(rows[:, :1]))
    return moe.shared_expert(x) + routed.view(len(x), moe.top_k, -1).sum(1), logits
