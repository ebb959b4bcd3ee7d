"""Rows -> `Pack`: ids, positions, labels, loss weights, borders of one whole sequence; which rows: `pack_plan`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ds_longft.batch import IGNORE_INDEX, Pack

if TYPE_CHECKING:
    from ds_longft.data.tokenized import TokenizedRow, Weighting

Document = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""input_ids, labels, loss_weights of one document."""


def build_pack(rows: Sequence[TokenizedRow], *, pad_to_multiple: int, pad_id: int, weighting: Weighting) -> Pack:
    """Lay rows head to tail, each a document of its own, and pad to a multiple of `pad_to_multiple` tokens.

    The label of a token is the next token, where that lies in a target span of the same document; else IGNORE_INDEX.
    The weight of a label is span weight * row weight, divided by the row's number of targets with `sample` weighting.
    Padding is the last document, without targets.
    """
    lengths = [len(row.input_ids) for row in rows]
    tokens = sum(lengths)
    padding = -tokens % pad_to_multiple
    pack = _blank([*lengths, padding] if padding else lengths, pad_id, padding, tuple(row.index for row in rows))
    for row, start in zip(rows, pack.cu_seqlens.tolist(), strict=False):
        pack.input_ids[start : start + len(row.input_ids)] = row.input_ids
        spans = zip(row.span_start.tolist(), row.span_end.tolist(), row.label_weights(weighting), strict=True)
        for first, end, weight in spans:
            from_token = max(first, 1)  # nothing predicts the first token of a document
            labels = slice(start + from_token - 1, start + end - 1)
            pack.labels[labels] = row.input_ids[from_token:end]
            pack.loss_weights[labels] = weight
    return pack


def filler_pack(tokens: int, pad_id: int = 0) -> Pack:
    """A pack of padding alone, zero weight: keeps every rank at the same number of micro-steps."""
    return _blank([tokens], pad_id, tokens, ())


def documents_of(pack: Pack) -> list[Document]:
    """The documents of a pack, without its padding."""
    spans = list(pairwise(pack.cu_seqlens.tolist()))[: -1 if pack.padding_tokens else None]
    return [(pack.input_ids[a:b], pack.labels[a:b], pack.loss_weights[a:b]) for a, b in spans]


def pack_of(documents: Sequence[Document], multiple: int, pad_id: int = 0) -> Pack:
    """Documents laid head to tail and padded to a multiple of `multiple` tokens."""
    if not documents:
        return filler_pack(multiple, pad_id)
    lengths = [len(ids) for ids, _, _ in documents]
    padding = -sum(lengths) % multiple
    pack = _blank([*lengths, padding] if padding else lengths, pad_id, padding, ())
    for (ids, labels, weights), (a, b) in zip(documents, pairwise(pack.cu_seqlens.tolist()), strict=False):
        pack.input_ids[a:b], pack.labels[a:b], pack.loss_weights[a:b] = ids, labels, weights
    return pack


def _blank(lengths: Sequence[int], pad_id: int, padding: int, rows: tuple[int, ...]) -> Pack:
    """A pack of documents of these lengths that hold nothing but padding yet."""
    tokens = sum(lengths)
    return Pack(
        input_ids=np.full(tokens, pad_id, dtype=np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        labels=np.full(tokens, IGNORE_INDEX, dtype=np.int64),
        loss_weights=np.zeros(tokens, dtype=np.float32),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        padding_tokens=padding,
        rows=rows,
    )
