"""A model on one rank's shard: from a batch to sums of token losses. What every objective runs on."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from ds_longft.batch import Batch
from ds_longft.layout import ParallelLayout
from ds_longft.model.rope_lengths import set_rope_lengths
from ds_longft.sequence.attention import ULYSSES
from ds_longft.sequence.llama4 import take_over_temperatures
from ds_longft.sequence.loss import ChunkedHead, DocumentRows
from ds_longft.sequence.mask import no_padding
from ds_longft.sequence.new_rows import EmbeddingRows
from ds_longft.sequence.state.families import spread_state_layers


def decode(
    decoder: Any,
    batch: Batch,
    layout: ParallelLayout,
    kernel: str,
    kv_heads_at_a_time: int | None = None,
    **keeping: Any,
) -> Tensor:
    """The hidden states [s, D] of this rank's tokens. Collective over the sp group: attention exchanges heads.

    `keeping`: more for the decoder and its layers, to keep keys, values and states.
    """
    set_rope_lengths(decoder, batch.documents.lengths, batch.document_tokens)
    hidden: Tensor = decoder(
        input_ids=batch.input_ids,
        attention_mask=no_padding(batch.input_ids.shape[1], batch.input_ids.device),
        position_ids=batch.position_ids,
        use_cache=False,  # it would make a cache of its own where it is given none
        documents=batch.documents,
        layout=layout,
        kernel=kernel,
        kv_heads_at_a_time=kv_heads_at_a_time,
        **keeping,
    ).last_hidden_state[0]
    return hidden


class ShardedModel:
    """The decoder and the chunked head of a PeftModel or a plain causal LM. Not a module: registers nothing."""

    def __init__(self, model: nn.Module, *, kv_heads_at_a_time: int | None = None, adapters_off: bool = False) -> None:
        """`adapters_off`: it will also run with PEFT's adapters switched off."""
        self.kv_heads_at_a_time = kv_heads_at_a_time
        # PEFT changes linears in place; the plain causal LM under it still runs with its adapters.
        causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        # A multimodal model's text model has a config of its own; not everything called a decoder is a model.
        seen = getattr(causal_lm.get_decoder(), "config", causal_lm.config)._attn_implementation
        assert seen == ULYSSES, f"the model's attention is {seen}: every rank would attend to its own shard alone"
        spread_state_layers(causal_lm)
        take_over_temperatures(causal_lm)
        self.decoder = causal_lm.get_decoder()
        self.head = ChunkedHead.install(causal_lm, adapters_off=adapters_off)
        EmbeddingRows.install(causal_lm)

    def loss_sums(self, batch: Batch, layout: ParallelLayout, kernel: str) -> Tensor:
        """sum(w * ce) over this rank's targets, a scalar in at least float32; where the batch's targets know their
        document, the sum of each document, [N] float64. No collective beyond attention's.
        """
        hidden = decode(self.decoder, batch, layout, kernel, self.kv_heads_at_a_time)  # [s, D]
        documents = None
        if batch.target_documents is not None:
            documents = DocumentRows(batch.target_documents, len(batch.documents.lengths))
        rows = hidden[batch.target_rows]  # [t, D]
        sums: Tensor = self.head(rows, batch.targets, batch.target_weights, documents)
        return sums
