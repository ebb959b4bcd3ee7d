"""The weighted sum of token losses, over labelled rows only, in chunks: no vocabulary-sized tensor of the whole sample.

The sum is what leaves a rank; who divides by what is one rule for everybody (`train/trainer.py`). A rank whose shard holds
no target still runs the head on zero rows: it contributes an exact zero, and under ZeRO-3 it takes part in the gathers.

Letters: s local tokens, t labelled rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from ds_longft.errors import ModelError

CHUNK_BYTES = 1 << 30
"""Float32 logits alive at once; 2,048 rows of a 128K vocabulary."""


def logit_transform(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """What the model does to its logits after the head: soft capping (Gemma) or nothing.

    Raises:
        ModelError: the config scales its logits in a way this loss does not know.
    """
    unknown = [
        key
        for key in ("logits_scaling", "logit_scale", "lm_head_multiplier")
        if getattr(config, key, None) not in (None, 1, 1.0)
    ]
    if unknown:
        raise ModelError(
            f"{config.model_type} scales its logits ({', '.join(unknown)}), which the chunked loss does not do"
        )
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        return lambda logits: logits
    return lambda logits: torch.tanh(logits / cap) * cap


def weighted_nll(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    transform: Callable[[Tensor], Tensor],
    chunk_rows: int,
) -> Tensor:
    """sum(weights * cross_entropy(transform(head(hidden)), targets)), a scalar in at least float32.

    hidden [t, D], targets [t], weights [t]. Each chunk's logits [rows, V] live only while it is computed, forward and
    backward.
    """

    def chunk_sum(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
        logits = transform(head(h))  # [rows, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (F.cross_entropy(logits, y, reduction="none") * w).sum()

    chunks = zip(hidden.split(chunk_rows), targets.split(chunk_rows), weights.split(chunk_rows), strict=True)
    parts: list[Any] = [checkpoint(chunk_sum, h, y, w, use_reentrant=False) for h, y, w in chunks]
    return torch.stack(parts).sum()


class ChunkedHead:
    """Makes a model's output head compute `weighted_nll` in one module call.

    One call, because under ZeRO-3 each call of a module gathers its weights: a number of calls that depended on a rank's
    own labels would leave the other ranks waiting.
    """

    def __init__(self, head: nn.Module, config: PretrainedConfig) -> None:
        self.plain = head.forward
        self.transform = logit_transform(config)
        self.chunk_rows = max(1, CHUNK_BYTES // (4 * config.vocab_size))

    def __call__(self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Logits [.., V] as before without targets; with them, the weighted sum over rows [t, D]."""
        if targets is None or weights is None:
            return self.plain(hidden)
        return weighted_nll(self.plain, hidden, targets, weights, self.transform, self.chunk_rows)

    @classmethod
    def install(cls, model: nn.Module, config: PretrainedConfig) -> nn.Module:
        """Replace the forward of the model's output head; returns the head.

        A head with parts of its own (LoRA on it, `modules_to_save`) becomes a ZeRO-3 leaf: gathered once with all its
        parts, whatever the number of chunks.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output head to train with")
        head.forward = cls(head, config)
        if any(True for _ in head.children()):
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(head, True)
        return head
