"""Embeddings and an output head of which some rows, those of new tokens, are trained beside their frozen matrix.

PEFT makes a copy of the matrix with the rows in it at each pass, and its gradient in the backward one: a GiB each for
128K tokens of 4,096 numbers. Here neither is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from ds_longft.sequence.linear import Member, Weight, gather_with


@dataclass(frozen=True)
class EmbeddingRows:
    """Takes the place of a forward of PEFT's `TrainableTokensLayer` around the embeddings."""

    layer: TrainableTokensLayer

    def __call__(self, tokens: Tensor) -> Tensor:
        """[..] token ids -> [.., D]."""
        found: Tensor = self.layer.base_layer(tokens)
        if self.layer.disable_adapters:
            return found
        (rows,), (ids,) = self.layer.trainable_tokens_delta.values(), self.layer.token_indices.values()
        known = torch.tensor(ids, device=tokens.device)  # rising
        at = torch.bucketize(tokens, known).clamp(max=len(ids) - 1)
        new = F.embedding(at, rows)
        scale = getattr(self.layer.base_layer, "embed_scale", None)  # of Gemma
        return torch.where((known[at] == tokens)[..., None], new if scale is None else new * scale.to(new.dtype), found)

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Around the embeddings of a model with trained rows, if it has any; under ZeRO-3 they are gathered with it."""
        wrapper = model.get_input_embeddings()  # type: ignore[operator]
        if isinstance(wrapper, TrainableTokensWrapper):
            layer = wrapper.token_adapter
            layer.forward = cls(layer)
            gather_with(layer, layer.trainable_tokens_delta.values())


@dataclass(frozen=True)
class WithRows(Member):
    """The logits of these tokens come from rows of their own, the others from the matrix, which is never copied."""

    layer: Any  # PEFT's TrainableTokensLayer, or the one of the embeddings it is tied to

    @classmethod
    def of(cls, head: Any) -> WithRows:
        """From PEFT's wrapper around the head."""
        layer = head.token_adapter
        return cls(layer.base_layer, None, layer.tied_adapter or layer)

    def tensors(self) -> tuple[Weight, ...]:
        """Those of a plain head, and the rows [n, I]."""
        return *super().tensors(), *self.layer.trainable_tokens_delta.values()

    def plain(self, x: Tensor, tensors: Sequence[Weight] | None = None) -> Tensor:
        """The logits, by autograd; with `tensors` in place of its own."""
        *own, rows = self.tensors() if tensors is None else tensors
        assert isinstance(rows, Tensor)
        (tokens,) = self.layer.token_indices.values()
        index = torch.tensor(tokens, device=x.device)
        bias = None if self.base.bias is None else self.base.bias[index]
        return super().plain(x, own).index_copy(-1, index, F.linear(x, rows, bias))
