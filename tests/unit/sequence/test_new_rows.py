"""Embeddings with rows of new tokens beside their matrix: what PEFT computes with a copy of it."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from ds_longft.sequence.new_rows import EmbeddingRows

EMBEDDINGS = {
    "plain": lambda: nn.Embedding(12, 4),
    "scaled": lambda: Gemma3TextScaledWordEmbedding(12, 4, padding_idx=0, embed_scale=3.0),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("ids", [[3], [0, 7, 11]])
def test_the_same_as_with_a_copy(kind: str, ids: list[int]) -> None:
    torch.manual_seed(0)
    base = EMBEDDINGS[kind]().double().requires_grad_(False)
    layer = TrainableTokensLayer(base, "default")
    layer.update_layer("default", token_indices=ids, init_weights=False)
    layer.set_adapter(["default"])
    rows = layer.trainable_tokens_delta["default"]
    tokens = torch.randint(0, 12, (2, 40))
    weights = torch.randn(2, 40, 4, dtype=torch.float64)

    def with_gradient(forward) -> tuple[torch.Tensor, torch.Tensor]:
        found = forward(tokens)
        (gradient,) = torch.autograd.grad((found * weights).sum(), rows)
        return found.detach(), gradient

    theirs, ours = with_gradient(layer), with_gradient(EmbeddingRows(layer))
    assert torch.equal(ours[0], theirs[0])
    if 0 not in ids or kind == "plain":  # PEFT gives the row of a padding token no gradient
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=0)
    layer.enable_adapters(False)
    assert torch.equal(EmbeddingRows(layer)(tokens), base(tokens))
