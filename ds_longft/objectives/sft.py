"""Supervised fine-tuning: the module the engine wraps, from this rank's batch to its weighted loss sum."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ds_longft.batch import Batch
from ds_longft.layout import ParallelLayout
from ds_longft.model.rope import set_rope_length
from ds_longft.sequence.attention import ULYSSES
from ds_longft.sequence.loss import ChunkedHead


class SftObjective(nn.Module):
    """Holds the model (a PeftModel or a plain causal LM) and computes sum(w * ce) over this rank's targets."""

    def __init__(
        self, model: nn.Module, layout: ParallelLayout, kernel: str = "auto", kv_heads_at_a_time: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.kernel = kernel
        self.kv_heads_at_a_time = kv_heads_at_a_time
        # PEFT changes linears in place; the plain causal LM under it still runs with its adapters.
        causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        seen = causal_lm.config._attn_implementation
        assert seen == ULYSSES, f"the model's attention is {seen}: every rank would attend to its own shard alone"
        self._decoder = [causal_lm.get_decoder()]  # in a list: not a second registration of its parameters
        self._head = [ChunkedHead.install(causal_lm, causal_lm.config)]

    def forward(self, batch: Batch) -> Tensor:
        """This rank's weighted sum, a scalar in at least float32; no collective beyond attention's."""
        set_rope_length(self._decoder[0], batch.documents.max_length)  # the whole pack's, not this shard's
        hidden = self._decoder[0](
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            documents=batch.documents,
            layout=self.layout,
            kernel=self.kernel,
            kv_heads_at_a_time=self.kv_heads_at_a_time,
        ).last_hidden_state  # [1, s, D]
        return self._head[0](hidden[0, batch.target_rows], batch.targets, batch.target_weights)
