"""Supervised fine-tuning: the module the engine wraps, from this rank's batch to its weighted loss sum."""

from __future__ import annotations

from torch import Tensor, nn

from ds_longft.batch import Batch
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.forward import ShardedModel


class SftObjective(nn.Module):
    """Holds the model (a PeftModel or a plain causal LM) and computes sum(w * ce) over this rank's targets."""

    def __init__(
        self, model: nn.Module, layout: ParallelLayout, kernel: str = "auto", kv_heads_at_a_time: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.kernel = kernel
        self._sharded = ShardedModel(model, kv_heads_at_a_time=kv_heads_at_a_time)

    def forward(self, batch: Batch) -> Tensor:
        """This rank's weighted sum, a scalar in at least float32; no collective beyond attention's."""
        return self._sharded.loss_sums(batch, self.layout, self.kernel)
