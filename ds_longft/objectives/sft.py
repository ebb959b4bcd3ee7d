"""Supervised fine-tuning: from this rank's batch to its weighted loss sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ds_longft.batch import Batch, Pack
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.forward import ShardedModel
from ds_longft.objectives.objective import Objective
from ds_longft.sequence.shard import shard


class SftObjective(Objective):
    """Holds the model (a PeftModel or a plain causal LM) and computes sum(w * ce) over this rank's targets."""

    def __init__(
        self, model: nn.Module, layout: ParallelLayout, kernel: str = "auto", kv_heads_at_a_time: int | None = None
    ) -> None:
        super().__init__(model, layout, kernel)
        self._sharded = ShardedModel(model, kv_heads_at_a_time=kv_heads_at_a_time)

    def forward(self, batch: Batch) -> Tensor:
        """This rank's weighted sum, a scalar in at least float32; no collective beyond attention's."""
        return self._sharded.loss_sums(batch, self.layout, self.kernel)

    def backpropagate(  # noqa: D102
        self, engine: Any, pack: Pack, scale: float, layout: ParallelLayout, device: torch.device
    ) -> Tensor:
        loss_sum = engine(shard(pack, layout, device))
        value: Tensor = loss_sum.detach()
        engine.backward(loss_sum * torch.where(value.isfinite(), scale, math.nan), scale_wrt_gas=False)
        return value.view(1)

    def evaluate(self, engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> Tensor:  # noqa: D102
        return engine(shard(pack, layout, device)).view(1)
