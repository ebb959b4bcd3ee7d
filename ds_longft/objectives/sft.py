"""Supervised fine-tuning: from this rank's batch to its weighted loss sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_longft.batch import Batch, Pack
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.forward import ShardedModel
from ds_longft.objectives.objective import Objective
from ds_longft.objectives.router_losses import NAMES, RouterLosses
from ds_longft.sequence.shard import shard


class SftObjective(Objective):
    """Holds the model (a PeftModel or a plain causal LM) and computes sum(w * ce) over this rank's targets.

    With `routers`, a mixture's losses of its routers are trained and recorded besides (`router_losses.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ParallelLayout,
        kernel: str = "auto",
        kv_heads_at_a_time: int | None = None,
        router_factors: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """`router_factors`: of the routers' aux and z losses."""
        super().__init__(model, layout, kernel)
        self._sharded = ShardedModel(model, kv_heads_at_a_time=kv_heads_at_a_time)
        self.routers = RouterLosses(self._sharded.decoder, *router_factors) if any(router_factors) else None
        self.metrics = NAMES if self.routers is not None else ()
        self._known = False  # the loads of this step's experts

    def forward(self, batch: Batch) -> Tensor:
        """This rank's weighted sum, a scalar in at least float32; no collective beyond attention's."""
        return self._sharded.loss_sums(batch, self.layout, self.kernel)

    @torch.no_grad()
    def before_step(  # noqa: D102
        self, engine: Any, packs: Sequence[Pack], layout: ParallelLayout, device: torch.device
    ) -> None:
        self._known = self.routers is not None and len(packs) > 1
        if self.routers is not None and self._known:
            choices = []
            for pack in packs:
                self._recorded(engine, pack, layout, device)
                choices.append(self.routers.choices)
            self.routers.settle(torch.stack(choices).sum(0))

    def backpropagate(  # noqa: D102
        self, engine: Any, pack: Pack, scale: float, layout: ParallelLayout, device: torch.device
    ) -> Tensor:
        loss_sum = self._recorded(engine, pack, layout, device)
        value: Tensor = loss_sum.detach()
        sums = value.view(1)
        if self.routers is not None:
            if not self._known:
                self.routers.settle(self.routers.choices)
            weight = layout.world / scale if scale else 0.0  # what the trainer divides all sums by
            sums = torch.cat([sums.double(), self.routers.values() * weight])
        engine.backward(loss_sum * torch.where(value.isfinite(), scale, math.nan), scale_wrt_gas=False)
        return sums

    def evaluate(self, engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> Tensor:  # noqa: D102
        loss_sum = engine(shard(pack, layout, device)).view(1)
        return torch.cat([loss_sum, loss_sum.new_full((len(self.metrics),), math.nan)])  # of routers: not evaluated

    def _recorded(self, engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> Tensor:
        """The pack's weighted sum, what its routers do written down."""
        if self.routers is not None:
            part = pack.part(layout.sp, layout.sp_rank)
            end = min(part.stop, pack.tokens - pack.padding_tokens)
            self.routers.real, self.routers.recording = max(0, end - part.start), True
        loss_sum: Tensor = engine(shard(pack, layout, device))
        if self.routers is not None:
            self.routers.recording = False
        return loss_sum
