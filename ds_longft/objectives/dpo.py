"""Preference training (DPO and its relatives): the module the engine wraps. The loss itself is in `pair_loss`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ds_longft.batch import Batch, Pack
from ds_longft.config.train_keys import DpoConfig
from ds_longft.data.pairs import pair_sides
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import adapters_off
from ds_longft.objectives.forward import ShardedModel
from ds_longft.objectives.objective import Objective, reference_of
from ds_longft.objectives.pair_loss import METRICS
from ds_longft.objectives.passes import backpropagate_pairs, evaluate_pairs


class DpoObjective(Objective):
    """Holds the model and, where it needs one of its own, the frozen reference model."""

    metrics = METRICS

    def __init__(
        self,
        model: nn.Module,
        layout: ParallelLayout,
        dpo: DpoConfig,
        kernel: str = "auto",
        *,
        reference_model: nn.Module | None = None,
        kv_heads_at_a_time: int | None = None,
    ) -> None:
        super().__init__(model, layout, kernel)
        self.reference_model = reference_model
        self.dpo = dpo
        self.reference = reference_of(dpo, lora=isinstance(model, PeftModel))
        assert (self.reference == "model") == (reference_model is not None)
        self.passes = "two" if dpo.passes == "two" else "one"  # auto: decided by the planner
        heads = kv_heads_at_a_time
        self._sharded = ShardedModel(model, kv_heads_at_a_time=heads, adapters_off=isinstance(model, PeftModel))
        self._reference = None
        if reference_model is not None:
            self._reference = ShardedModel(reference_model, kv_heads_at_a_time=heads)

    def forward(self, batch: Batch, of_reference: bool = False) -> Tensor:
        """This rank's sums of -log p over the targets of each document, [N] float64 (one scalar where they do not know
        their document); no collective beyond attention's. `of_reference`: without gradient.
        """
        sharded = self._reference if of_reference and self._reference is not None else self._sharded
        off = of_reference and self._reference is None and isinstance(self.model, PeftModel)
        with adapters_off(self.model) if off else nullcontext():
            return sharded.loss_sums(batch, self.layout, self.kernel)

    def backpropagate(  # noqa: D102
        self, engine: Any, pack: Pack, scale: float, layout: ParallelLayout, device: torch.device
    ) -> Tensor:
        return backpropagate_pairs(engine, pack, scale, layout, device)

    def evaluate(self, engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> Tensor:  # noqa: D102
        return evaluate_pairs(engine, pack, layout, device)

    def tokens_at_once(self, pack: Pack) -> int:  # noqa: D102
        sides = pair_sides(pack, self.layout.sp) if self.passes == "two" else (pack,)
        return max(side.tokens for side in sides)
