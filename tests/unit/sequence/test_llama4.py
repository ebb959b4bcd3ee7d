"""Llama 4: temperatures by a token's place in its document, chunks, and experts that only their own tokens go through."""

from __future__ import annotations

import pytest
import torch
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from ds_longft.batch import Documents
from ds_longft.sequence.attention import cut
from ds_longft.sequence.experts import group_experts
from ds_longft.sequence.llama4 import Temperature

LENGTHS = (5, 1, 10)


def documents(*lengths: int) -> Documents:
    return Documents(torch.tensor([0, *lengths]).cumsum(0).int(), lengths)


def test_a_query_is_scaled_by_its_place_in_its_document_on_any_rank() -> None:
    temperature, query = Temperature(4, 0.1), torch.randn(1, 2, 16, 3)
    places = torch.cat([torch.arange(n) for n in LENGTHS])
    factor = torch.log1p(torch.floor((places.float() + 1.0) / 4)) * 0.1 + 1.0  # transformers' own line
    expected = query * factor[:, None]
    assert len(set(factor.tolist())) == 3
    parts = [temperature.tuned(query[:, :, 8 * rank :][:, :, :8], documents(*LENGTHS), rank) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat(parts, 2), expected)
    own = temperature.tuned(query[:, :, 6:], documents(10), 0)  # a rank with the last document alone
    torch.testing.assert_close(own, expected[:, :, 6:])


def test_chunks_start_anew_in_each_document() -> None:
    chunks = cut(documents(*LENGTHS), 4)
    assert chunks.lengths == (4, 1, 1, 4, 4, 2)
    assert chunks.cu_seqlens.tolist() == [0, 4, 5, 6, 10, 14, 16]


@pytest.mark.parametrize("used", [1, 2])
@pytest.mark.parametrize("tile_tokens", [None, 5])
def test_own_experts_alone_give_what_all_of_them_give(used: int, tile_tokens: int | None) -> None:
    """Outputs and every gradient, in float64."""
    config = Llama4TextConfig(hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=used)
    torch.manual_seed(0)
    results = []
    for grouped in (False, True):
        moe = Llama4TextMoe(config).double()
        with torch.no_grad():
            for i, p in enumerate(moe.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype) * 0.3)
        layer = torch.nn.Sequential(moe)
        assert len(group_experts(layer, tile_tokens) if grouped else [1]) == 1
        x = torch.randn(1, 13, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
        out, logits = moe(x.clone())
        (out.square().sum() + logits.sum()).backward()
        results.append([out.detach(), logits.detach(), x.grad, *(p.grad for p in moe.parameters())])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
