"""Preference pairs as tokens: encoded together, kept on disk with one prompt, laid into a pack as two documents.

On disk a pair is one row: the tokens both answers' documents begin with, then the rest of the chosen one, then the rest
of the rejected one. In a pack they are two complete documents, and a pair never lies in two packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ds_longft.batch import Pack, Pairs
from ds_longft.data.encode import EncodedRow, Encoder, Overlong
from ds_longft.data.pack import build_pack, documents_of, pack_of
from ds_longft.data.preferences import PreferenceRow
from ds_longft.data.rows import BadRow, Row
from ds_longft.data.tokenized import SCHEMA, TokenizedRow, TokenizedSet, Weighting, columns_of, record_batch

PAIR_SCHEMA = pa.schema(
    [
        *SCHEMA,  # input_ids: shared, chosen, rejected; spans: of the chosen document, then of the rejected one
        ("shared_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),  # without the shared ones
        ("chosen_spans", pa.int32()),
    ]
)


@dataclass(frozen=True)
class EncodedPair:
    """Both documents of a pair."""

    chosen: EncodedRow
    rejected: EncodedRow

    @property
    def truncated(self) -> bool:
        """Whether the prompt was cut, in both alike."""
        return self.chosen.truncated

    @property
    def row(self) -> Row:
        """The row of the chosen document."""
        return self.chosen.row

    @property
    def shared_tokens(self) -> int:
        """Tokens both documents begin with: the prompt, and what their answers have in common."""
        a, b = self.chosen.input_ids, self.rejected.input_ids
        n = min(len(a), len(b))
        differs = np.flatnonzero(a[:n] != b[:n])
        return int(differs[0]) if len(differs) else n


def encode_pairs(encoder: Encoder, pairs: Sequence[PreferenceRow]) -> list[EncodedPair | BadRow]:
    """One result a pair, in order: its tokens, or why it was left out.

    Each document may be `max_length_tokens` long. Where one is longer and `overlong` is truncate, the prompt is cut, in
    both alike.
    """
    whole = replace(encoder, overlong="drop")
    encoded = whole.encode([row for pair in pairs for row in pair.documents])
    results: list[EncodedPair | BadRow] = []
    for pair, a, b in zip(pairs, encoded[::2], encoded[1::2], strict=True):
        bad = next((x for x in (a, b) if isinstance(x, BadRow)), None)
        if isinstance(a, EncodedRow) and isinstance(b, EncodedRow):
            results.append(EncodedPair(a, b))
        elif isinstance(bad, Overlong) and encoder.overlong == "truncate":
            results.append(_truncated(encoder, pair))
        else:
            assert bad is not None
            results.append(bad)
    return results


def _truncated(encoder: Encoder, pair: PreferenceRow) -> EncodedPair | BadRow:
    """Both documents with the prompt cut so that the longer one fits."""
    rows, whole = pair.documents, replace(encoder, overlong="drop")
    for row in rows:  # one of the two is the longer one
        (cut,) = encoder.encode([row])
        if isinstance(cut, BadRow):
            return cut
        prompt = cut.row.turns[: len(pair.prompt)]
        a, b = whole.encode([replace(row, turns=prompt + row.turns[len(pair.prompt) :]) for row in rows])
        if isinstance(a, EncodedRow) and isinstance(b, EncodedRow):
            return EncodedPair(replace(a, truncated=True), replace(b, truncated=True))
    return Overlong("too long, and the answers alone do not fit")


def pairs_to_batch(pairs: Sequence[EncodedPair]) -> pa.RecordBatch:
    """Pairs as `PAIR_SCHEMA`."""
    shared = [pair.shared_tokens for pair in pairs]
    ids = [np.concatenate([p.chosen.input_ids, p.rejected.input_ids[n:]]) for p, n in zip(pairs, shared, strict=True)]
    columns = columns_of([(pair.chosen, pair.rejected) for pair in pairs], ids) | {
        "shared_tokens": shared,
        "chosen_tokens": [len(p.chosen.input_ids) - n for p, n in zip(pairs, shared, strict=True)],
        "chosen_spans": [len(p.chosen.span_start) for p in pairs],
    }
    return record_batch(columns, PAIR_SCHEMA)


class PairSet(TokenizedSet):
    """Tokenized preference pairs; a row is a pair. `length` counts both documents, as a pack does."""

    documents_per_row = 2
    schema = PAIR_SCHEMA
    _reference: NDArray[np.float64] | None = None  # [rows of the file, 2]

    def with_reference(self, logps: NDArray[np.float64]) -> PairSet:
        """The set with the reference's log-probabilities [rows, 2] (chosen, rejected) of the whole file's rows."""
        assert logps.shape == (self._table.num_rows, 2), f"{logps.shape} for {self._table.num_rows} pairs"
        with_it = type(self)(self._table, self.fingerprint, self.tally, self._rows)
        with_it._reference = logps
        return with_it

    def part(self, rows: NDArray[np.int64], fingerprint: str) -> PairSet:
        """Some of the rows, with their reference."""
        part = type(self)(self._table, fingerprint, self.tally, self._rows[rows])
        part._reference = self._reference
        return part

    def documents(self, index: int) -> tuple[TokenizedRow, TokenizedRow]:
        """Pair `index` as chosen and rejected document."""
        row, at = self.row(index), int(self._rows[index])
        shared, chosen, spans = (
            self._table.column(name)[at].as_py() for name in ("shared_tokens", "chosen_tokens", "chosen_spans")
        )
        cut = shared + chosen

        def document(ids: NDArray[np.int32], own: slice) -> TokenizedRow:
            start, end = row.span_start[own], row.span_end[own]
            targets = int(np.sum(end - np.maximum(start, 1)))
            ones = np.ones(len(start), dtype=np.float32)
            return replace(row, input_ids=ids, span_start=start, span_end=end, span_weight=ones, targets=targets)

        return (
            document(row.input_ids[:cut], slice(0, spans)),
            document(np.concatenate([row.input_ids[:shared], row.input_ids[cut:]]), slice(spans, None)),
        )

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """[rows, 2] tokens of the chosen and of the rejected document of each pair."""
        both, shared, chosen = (self.column(name) for name in ("length", "shared_tokens", "chosen_tokens"))
        return np.stack([shared + chosen, both - chosen - shared], axis=1).astype(np.int64)

    def weight_sums(self, weighting: Weighting) -> NDArray[np.float64]:
        """[rows] the weight of each pair in the loss."""
        return self.column("row_weight").astype(np.float64)

    def pack(self, rows: Sequence[int], *, pad_to_multiple: int, pad_id: int, weighting: Weighting = "token") -> Pack:
        """Pairs laid head to tail, each as two documents. Each pair counts once, whatever the `weighting`."""
        documents = [document for row in rows for document in self.documents(row)]
        plain = [replace(document, row_weight=1.0) for document in documents]  # a pair's weight is not its tokens'
        pack = build_pack(plain, pad_to_multiple=pad_to_multiple, pad_id=pad_id, weighting="token")
        reference = None if self._reference is None else self._reference[self._rows[list(rows)]]
        weights = np.array([document.row_weight for document in documents[::2]], dtype=np.float32)
        return replace(pack, rows=tuple(rows), pairs=Pairs(weights, reference))


def pair_sides(pack: Pack, pad_to_multiple: int, pad_id: int = 0) -> tuple[Pack, Pack]:
    """The chosen documents of a pack of pairs, and its rejected ones, as packs of their own without `pairs`."""
    documents = documents_of(pack)
    return pack_of(documents[::2], pad_to_multiple, pad_id), pack_of(documents[1::2], pad_to_multiple, pad_id)
