"""Smaller packs made of a run's own: documents kept, each cut to a share of its tokens around its targets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ds_longft.batch import IGNORE_INDEX, Pack
from ds_longft.data.pack import filler_pack

Document = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""input_ids, labels, loss_weights of one document."""


def documents_of(pack: Pack) -> list[Document]:
    """The documents of a pack, without its padding."""
    borders = pack.cu_seqlens.tolist()
    spans = list(pairwise(borders))
    if pack.padding_tokens:
        spans = spans[:-1]
    return [(pack.input_ids[a:b], pack.labels[a:b], pack.loss_weights[a:b]) for a, b in spans]


def pack_of(documents: Sequence[Document], multiple: int, pad_id: int = 0) -> Pack:
    """Documents laid head to tail and padded to a multiple of `multiple` tokens."""
    if not documents:
        return filler_pack(multiple, pad_id)
    padding = -sum(len(ids) for ids, _, _ in documents) % multiple
    parts = list(documents)
    if padding:
        blank = filler_pack(padding, pad_id)
        parts.append((blank.input_ids, blank.labels, blank.loss_weights))
    lengths = [len(ids) for ids, _, _ in parts]
    return Pack(
        input_ids=np.concatenate([ids for ids, _, _ in parts]),
        position_ids=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
        labels=np.concatenate([labels for _, labels, _ in parts]),
        loss_weights=np.concatenate([weights for _, _, weights in parts]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        padding_tokens=padding,
    )


def shortened(pack: Pack, tokens: int, multiple: int) -> Pack:
    """At most `tokens` tokens of a pack (and at least a few of each document), its documents in proportion."""
    documents = documents_of(pack)
    total = sum(len(ids) for ids, _, _ in documents)
    if total <= tokens or not documents:
        return pack_of(documents, multiple)
    most = max(1, tokens // 4)  # documents
    documents = documents[:most]
    total = sum(len(ids) for ids, _, _ in documents)
    return pack_of([_window(d, max(2, len(d[0]) * tokens // total)) for d in documents], multiple)


def in_two(pack: Pack, multiple: int) -> tuple[Pack, Pack]:
    """The documents of a pack dealt to two packs. With a single document the second holds padding alone."""
    documents = documents_of(pack)
    return pack_of(documents[::2], multiple), pack_of(documents[1::2], multiple)


def two_documents(pack: Pack, multiple: int) -> Pack:
    """The pack, or where it holds a single document that document cut in two: isolation needs a neighbour."""
    documents = documents_of(pack)
    if len(documents) > 1 or not documents or len(documents[0][0]) < 4:
        return pack
    ids, labels, weights = documents[0]
    half = len(ids) // 2
    return pack_of([(ids[a:b], labels[a:b], weights[a:b]) for a, b in ((0, half), (half, len(ids)))], multiple)


def weight_of(packs: Sequence[Pack]) -> float:
    """Sum of the loss weights, as the loss divides by it."""
    return float(sum(pack.loss_weights.sum(dtype=np.float64) for pack in packs))


def _window(document: Document, length: int) -> Document:
    """`length` tokens that end where the targets end, so that an answer behind a long prompt is kept."""
    ids, labels, weights = document
    targets = np.flatnonzero((labels != IGNORE_INDEX) & (weights != 0))
    end = min(len(ids), int(targets[-1]) + 2) if len(targets) else len(ids)
    end = max(end, min(length, len(ids)))
    start = max(0, end - length)
    kept_labels, kept_weights = labels[start:end].copy(), weights[start:end].copy()
    kept_labels[-1], kept_weights[-1] = IGNORE_INDEX, 0.0  # its target lies outside
    return ids[start:end], kept_labels, kept_weights
