"""What a mask function asks for is told exactly, and done or refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils as masks

from ds_longft.batch import Documents
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.attention import ulysses_attention
from ds_longft.sequence.mask import AskedMask, asked_mask, no_padding, pads_nothing, window_of

IDS = torch.tensor([[0, 0, 0, 1, 1, 1]])


def every_other_token(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv - q) % 2 == 0


@pytest.mark.parametrize("window", [1, 2, 3, 8, 4095, 4096, 131_072, 1_000_003])
@pytest.mark.parametrize("told", [True, False])
def test_causal_masks_and_windows_of_any_length(window: int, told: bool) -> None:
    assert asked_mask(mask_function=masks.causal_mask_function) == AskedMask(True, None)
    function = masks.sliding_window_causal_mask_function(window)
    assert asked_mask(mask_function=function, local_size=window if told else None) == AskedMask(True, window)


@pytest.mark.parametrize("chunk", [2, 3, 8, 8192])
def test_chunks_are_known_by_their_size(chunk: int) -> None:
    function = masks.chunked_causal_mask_function(chunk, torch.zeros(1, dtype=torch.long))
    assert asked_mask(mask_function=function, local_size=chunk) == AskedMask(False, None, chunk)
    padded = masks.chunked_causal_mask_function(chunk, torch.ones(1, dtype=torch.long))  # chunks start a token later
    other = asked_mask(mask_function=padded, local_size=chunk)
    assert (other.causal, other.chunk_tokens) == (False, None)


@pytest.mark.parametrize(
    "function",
    [
        masks.bidirectional_mask_function,
        masks.sliding_window_bidirectional_mask_function(8),
        masks.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)),
        masks.chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.long)),
        masks.or_masks(masks.causal_mask_function, masks.blockwise_overlay(IDS)),
        masks.and_masks(masks.causal_mask_function, masks.packed_sequence_mask_function(IDS)),
        masks.and_masks(masks.causal_mask_function, every_other_token),
        masks.or_masks(masks.causal_mask_function, lambda b, h, q, kv: kv < 4),  # a prefix that sees itself
        lambda b, h, q, kv: (kv <= q) & ((h == 0) | (kv > q - 8)),  # another mask for each head
    ],
    ids=["all", "window both ways", "chunks", "long chunks", "blocks", "packed", "every other", "prefix", "by head"],
)
def test_anything_else_is_not_taken_for_one(function: masks.Callable) -> None:
    assert not asked_mask(mask_function=function, local_size=8).causal


def test_only_a_mask_that_pads_nothing_is_left_out() -> None:
    assert pads_nothing(no_padding(7, torch.device("cpu")))
    asked_mask(mask_function=masks.causal_mask_function, attention_mask=torch.ones(1, 7, dtype=torch.bool))
    with pytest.raises(ModelError, match="padding mask"):
        asked_mask(mask_function=masks.causal_mask_function, attention_mask=torch.tensor([[True, False]]))


def test_the_window_is_the_masks_or_the_keywords_and_never_two() -> None:
    assert window_of("Layer", None, 8) == 8
    assert window_of("Layer", AskedMask(True, 8), None) == 8
    assert window_of("Layer", AskedMask(True, 8), 8) == 8
    assert window_of("Layer", no_padding(7, torch.device("cpu")), 8) == 8
    for mask, keyword in ((AskedMask(True, 8), 9), (AskedMask(True, None), 8)):
        with pytest.raises(ModelError, match=r"Layer tells its attention a sliding window of . tokens.*its mask has"):
            window_of("Layer", mask, keyword)
    for mask in (AskedMask(False, None), torch.zeros(1, 1, 7, 7)):
        with pytest.raises(ModelError, match="Layer asks for a mask that is neither causal nor"):
            window_of("Layer", mask, None)


def test_a_model_that_computes_with_its_mask_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"computes with its attention mask \(`shape`\)"):
        _ = AskedMask(True, None).shape


def test_a_window_in_the_mask_alone_is_done() -> None:
    """Qwen2-MoE and Phi-3.5-MoE tell it to the mask and not to the attention: it was dropped."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    documents = Documents(torch.tensor([0, 30], dtype=torch.int32), (30,))

    def attention(mask: AskedMask | None, window: int | None) -> Tensor:
        layout = ParallelLayout(1, 0, 1)
        return ulysses_attention(nn.Module(), q, k, v, mask, documents=documents, layout=layout, sliding_window=window)[
            0
        ]

    by_mask = attention(AskedMask(True, 5), None)
    assert torch.equal(by_mask, attention(None, 5))
    assert not torch.allclose(by_mask, attention(None, None))
