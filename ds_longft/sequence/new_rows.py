"""An output head of which some rows, those of new tokens, are trained beside its frozen matrix, as PEFT does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_longft.sequence.linear import Member


@dataclass(frozen=True)
class WithRows(Member):
    """The logits of these tokens come from rows of their own, the others from the matrix, which is never copied."""

    layer: Any  # PEFT's TrainableTokensLayer, or the one of the embeddings it is tied to

    @classmethod
    def of(cls, head: Any) -> WithRows:
        """Of PEFT's wrapper around the head."""
        layer = head.token_adapter
        return cls(layer.base_layer, None, layer.tied_adapter or layer)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of a plain head, and the rows [n, I]."""
        return *super().tensors(), *self.layer.trainable_tokens_delta.values()

    def plain(self, x: Tensor, tensors: Sequence[Tensor | None] | None = None) -> Tensor:
        """The logits, by autograd; with `tensors` in place of its own."""
        *own, rows = self.tensors() if tensors is None else tensors
        assert rows is not None
        (tokens,) = self.layer.token_indices.values()
        index = torch.tensor(tokens, device=x.device)
        bias = None if self.base.bias is None else self.base.bias[index]
        return super().plain(x, own).index_copy(-1, index, F.linear(x, rows, bias))
