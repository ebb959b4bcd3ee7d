"""Smaller packs made of a run's own: documents kept, each cut to a share of its tokens around its targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ds_longft.batch import IGNORE_INDEX, Pack
from ds_longft.data.pack import Document, documents_of, pack_of


def shortened(pack: Pack, tokens: int, multiple: int) -> Pack:
    """At most `tokens` tokens of a pack (and at least a few of each document), its documents in proportion.

    Documents that were dealt whole to `multiple` ranks stay with them.
    Pairs stay whole, and lose their precomputed log-probabilities: they belong to the uncut answers.
    """
    documents = documents_of(pack)
    count = len(documents)
    per_row = pack.documents_per_row
    if sum(len(ids) for ids, _, _ in documents) > tokens:
        documents = documents[: per_row * max(1, tokens // (4 * per_row))]
        total = sum(len(ids) for ids, _, _ in documents)
        documents = [_window(d, max(2, len(d[0]) * tokens // total)) for d in documents]
    if pack.rank_borders is not None and pack.whole_documents(multiple) and len(documents) == count:
        short = pack_of(documents, 1)
        numbers = np.searchsorted(pack.cu_seqlens, pack.rank_borders)  # of the first document of each rank
        return replace(short, rank_borders=tuple(short.cu_seqlens[numbers].tolist()))
    return _laid(pack, documents, multiple, slice(len(documents) // per_row))


def in_two(pack: Pack, multiple: int) -> tuple[Pack, Pack]:
    """The documents (the pairs) of a pack dealt to two packs. With a single one the second holds padding alone."""
    documents, per_row = documents_of(pack), pack.documents_per_row
    in_rows = [documents[at : at + per_row] for at in range(0, len(documents), per_row)]
    first, second = (
        _laid(pack, [d for row in in_rows[i::2] for d in row], multiple, slice(i, None, 2)) for i in (0, 1)
    )
    return first, second


def _laid(pack: Pack, documents: Sequence[Document], multiple: int, rows: slice) -> Pack:
    """Documents of some rows of `pack` as a pack of their own."""
    return replace(pack_of(documents, multiple), pairs=None if pack.pairs is None else pack.pairs.part(rows))


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
    return sum(pack.total_weight for pack in packs)


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
