"""Smaller packs made of a run's own: documents kept, each cut to a share of its tokens around its targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ds_longft.batch import IGNORE_INDEX, Pack, Pairs
from ds_longft.data.pack import Document, documents_of, pack_of


def shortened(pack: Pack, tokens: int, multiple: int) -> Pack:
    """At most `tokens` tokens of a pack (and at least a few of each document), its documents in proportion.

    Documents that were dealt whole to `multiple` ranks stay with them.
    Pairs stay whole, and lose their precomputed log-probabilities: they belong to the uncut answers.
    """
    documents = documents_of(pack)
    count = len(documents)
    per_row = 2 if pack.pairs is not None else 1
    if sum(len(ids) for ids, _, _ in documents) > tokens:
        documents = documents[: per_row * max(1, tokens // (4 * per_row))]
        total = sum(len(ids) for ids, _, _ in documents)
        documents = [_window(d, max(2, len(d[0]) * tokens // total)) for d in documents]
    if pack.rank_borders is not None and pack.whole_documents(multiple) and len(documents) == count:
        short = pack_of(documents, 1)
        numbers = np.searchsorted(pack.cu_seqlens, pack.rank_borders)  # of the first document of each rank
        return replace(short, rank_borders=tuple(short.cu_seqlens[numbers].tolist()))
    return _laid(documents, multiple, None if pack.pairs is None else pack.pairs.weights[: len(documents) // 2])


def in_two(pack: Pack, multiple: int) -> tuple[Pack, Pack]:
    """The documents (the pairs) of a pack dealt to two packs. With a single one the second holds padding alone."""
    documents = documents_of(pack)
    if pack.pairs is None:
        return pack_of(documents[::2], multiple), pack_of(documents[1::2], multiple)
    pairs = list(zip(documents[::2], documents[1::2], strict=True))
    first, second = (
        _laid([d for pair in pairs[i::2] for d in pair], multiple, pack.pairs.weights[i::2]) for i in (0, 1)
    )
    return first, second


def _laid(documents: Sequence[Document], multiple: int, weights: NDArray[np.float32] | None) -> Pack:
    """Documents as a pack, of pairs where these have weights."""
    pack = pack_of(documents, multiple)
    return pack if weights is None else replace(pack, pairs=Pairs(weights))


def two_documents(pack: Pack, multiple: int) -> Pack:
    """The pack, or where it holds a single document that document cut in two: isolation needs a neighbour."""
    documents = documents_of(pack)
    if len(documents) > 1 or not documents or len(documents[0][0]) < 4:
        return pack
    ids, labels, weights = documents[0]
    half = len(ids) // 2
    return pack_of([(ids[a:b], labels[a:b], weights[a:b]) for a, b in ((0, half), (half, len(ids)))], multiple)


def weight_of(packs: Sequence[Pack]) -> float:
    """Sum of the loss weights (the weights of pairs), as the loss divides by it."""
    weights = (pack.loss_weights if pack.pairs is None else pack.pairs.weights for pack in packs)
    return float(sum(w.sum(dtype=np.float64) for w in weights))


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
