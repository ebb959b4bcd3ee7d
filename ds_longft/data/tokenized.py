"""`TokenizedSet`: tokenized rows on disk, read through a memory map."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ds_longft.batch import Pack
from ds_longft.data.encode import EncodedRow
from ds_longft.data.ledger import Tally
from ds_longft.data.pack import build_pack
from ds_longft.errors import DataError

Weighting = Literal["token", "sample", "gain"]

ROW_HASH_BYTES = 16

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "span_start": pa.list_(pa.int32()),
        "span_end": pa.list_(pa.int32()),
        "span_weight": pa.list_(pa.float32()),
        "row_weight": pa.float32(),
        "length": pa.int32(),
        "targets": pa.int32(),
        "source": pa.string(),
        "origin": pa.string(),
        "language": pa.string(),
        "row_hash": pa.binary(ROW_HASH_BYTES),  # of what is trained of it: ids, spans, weights
    }
)


@dataclass(frozen=True)
class TokenizedRow:
    """One row as the loader needs it. Spans are runs of target tokens, [start, end), in order."""

    index: int  # in the tokenized set
    input_ids: NDArray[np.int32]  # [length]
    span_start: NDArray[np.int32]  # [spans]
    span_end: NDArray[np.int32]  # [spans]
    span_weight: NDArray[np.float32]  # [spans]
    row_weight: float
    targets: int  # labels that are trained
    origin: str = ""

    def label_weights(self, weighting: Weighting) -> NDArray[np.float32]:
        """[spans] the loss weight of each label in a span."""
        return label_weights(self.span_weight, np.float32(self.row_weight), self.targets, weighting)


def label_weights(span_weight: Any, row_weight: Any, targets: Any, weighting: Weighting) -> NDArray[np.float32]:
    """Loss weight of one label: span weight * row weight, divided by the row's targets with `sample` weighting.

    With `gain`, spans have been cut by weight (`encode.weighted_by_gain`).
    The one place where this is computed: float32, so that the sum on the host is the sum of what is trained.
    """
    weights = np.multiply(span_weight, row_weight, dtype=np.float32)
    return np.divide(weights, targets, dtype=np.float32) if weighting == "sample" else weights


class TokenizedSet:
    """Rows of an Arrow file, or of a part of it. Cheap to open and to hold: the tokens stay on disk."""

    documents_per_row = 1
    schema = SCHEMA

    def __init__(self, table: pa.Table, fingerprint: str, tally: Tally, rows: NDArray[np.int64] | None = None) -> None:
        self._table = table
        self._rows = np.arange(table.num_rows, dtype=np.int64) if rows is None else rows
        self.fingerprint = fingerprint
        self.tally = tally  # of the whole file, also where this is a part of it

    @classmethod
    def open(cls, files: Sequence[Path], fingerprint: str, tally: Tally) -> Self:
        """Memory-map Arrow files with columns `schema`, one behind the other."""
        tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
        return cls(pa.concat_tables(tables or [cls.schema.empty_table()]), fingerprint, tally)

    def part(self, rows: NDArray[np.int64], fingerprint: str) -> TokenizedSet:
        """Some of the rows, by their numbers in this set."""
        return TokenizedSet(self._table, fingerprint, self.tally, self._rows[rows])

    @cached_property
    def content(self) -> str:
        """Names the rows by what is trained of them, in their order: whatever files, parts or places they came from."""
        chunks = self._table.column("row_hash").chunks
        hashes = [np.frombuffer(c.buffers()[1], f"V{ROW_HASH_BYTES}")[c.offset :][: len(c)] for c in chunks if len(c)]
        of_rows = np.concatenate(hashes)[self._rows].tobytes() if hashes else b""
        return hashlib.sha256(of_rows).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> TokenizedRow:
        """Row `index`; its arrays are views of the memory map."""
        at = int(self._rows[index])

        def values(name: str) -> Any:
            return self._table.column(name)[at].values.to_numpy(zero_copy_only=True)

        return TokenizedRow(
            index=index, input_ids=values("input_ids"), span_start=values("span_start"), span_end=values("span_end"),
            span_weight=values("span_weight"), row_weight=self._table.column("row_weight")[at].as_py(),
            targets=self._table.column("targets")[at].as_py(), origin=self._table.column("origin")[at].as_py(),
        )  # fmt: skip

    def counts(self) -> dict[str, Any]:
        """The set in a few numbers."""
        tokens, targets = int(self.lengths.sum()), int(self.targets.sum())
        return {
            "rows": len(self),
            "tokens": tokens,
            "longest_tokens": int(self.lengths.max()),
            "targets": targets,
            "target_share": round(targets / tokens, 6),
            "bad_rows": self.tally.bad_rows,
            "overlong_rows_dropped": self.tally.overlong,
            "truncated_rows": self.tally.truncated,
            "fingerprint": self.fingerprint,
        }

    def documents(self, index: int) -> tuple[TokenizedRow, ...]:
        """Row `index` as the documents it becomes in a pack: one."""
        return (self.row(index),)

    def column(self, name: str) -> NDArray[Any]:
        """A column of one value a row, e.g. `targets` or `source`, as numpy."""
        return self._table.column(name).to_numpy()[self._rows]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] tokens of each row."""
        return self.column("length").astype(np.int64)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """[rows] trained labels of each row."""
        return self.column("targets").astype(np.int64)

    def weight_sums(self, weighting: Weighting) -> NDArray[np.float64]:
        """[rows] sum of the loss weights of each row."""
        sums = np.zeros(self._table.num_rows, dtype=np.float64)
        at = 0
        columns = ["span_start", "span_end", "span_weight", "row_weight", "targets"]
        for batch in self._table.select(columns).to_batches():
            spans = batch.column("span_start")
            row = np.repeat(np.arange(batch.num_rows), np.diff(spans.offsets.to_numpy()))
            # The first token of a row has no token before it to predict it.
            labels = batch.column("span_end").flatten().to_numpy() - np.maximum(spans.flatten().to_numpy(), 1)
            each = label_weights(
                batch.column("span_weight").flatten().to_numpy(),
                batch.column("row_weight").to_numpy()[row],
                batch.column("targets").to_numpy()[row],
                weighting,
            )
            np.add.at(sums, at + row, labels * each.astype(np.float64))
            at += batch.num_rows
        return sums[self._rows]

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """[rows, documents of a row] tokens of each."""
        return self.lengths[:, None]

    def pack(self, rows: Sequence[int], *, pad_to_multiple: int, pad_id: int, weighting: Weighting) -> Pack:
        """Rows laid head to tail: see `build_pack`."""
        return build_pack(
            [self.row(row) for row in rows], pad_to_multiple=pad_to_multiple, pad_id=pad_id, weighting=weighting
        )

    def check_ids(self, vocab_size: int) -> None:
        """Raises DataError, naming a row, where the model has no embedding for a token: tokenizer of another model."""
        for batch in self._table.select(["input_ids", "origin"]).to_batches():
            ids = batch.column("input_ids")
            largest = pc.max(ids.flatten()).as_py()
            if largest is not None and largest >= vocab_size:
                row = next(i for i, each in enumerate(ids) if pc.max(each.values).as_py() == largest)
                raise DataError(
                    f"{batch.column('origin')[row]}: token id {largest}, but the model knows ids 0 to "
                    f"{vocab_size - 1}: the tokenizer beside it (model.path) is another model's, or "
                    "tokens were added to it without rows in the model's embeddings"
                )

    def split(self, fraction: float, seed: int) -> tuple[TokenizedSet, TokenizedSet]:
        """(training part, held-out part of about `fraction` of the rows), each in the order of the set.

        Raises `DataError` when one of them would be empty.
        """
        held_out = round(len(self) * fraction)
        if not 0 < held_out < len(self):
            raise DataError(
                f"data.eval_fraction {fraction} of {len(self)} rows holds out {held_out}: both parts need a row"
            )
        order = np.random.default_rng(seed).permutation(len(self))
        parts: Sequence[NDArray[np.int64]] = np.sort(order[held_out:]), np.sort(order[:held_out])
        names = [repr((self.fingerprint, name, fraction, seed)).encode() for name in ("train", "eval")]
        train, evaluation = (
            self.part(part, hashlib.sha256(name).hexdigest()[:16]) for name, part in zip(names, parts, strict=True)
        )
        return train, evaluation


def row_hash(arrays: Sequence[NDArray[Any]], *numbers: float) -> bytes:
    """Hash of a row's arrays and numbers."""
    made = hashlib.blake2b(repr((numbers, [len(array) for array in arrays])).encode(), digest_size=ROW_HASH_BYTES)
    for array in arrays:
        made.update(np.ascontiguousarray(array).data)
    return made.digest()


def to_record_batch(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    """Encoded rows as one Arrow batch with columns `SCHEMA`."""
    return record_batch(columns_of([(row,) for row in rows], [row.input_ids for row in rows]), SCHEMA)


def columns_of(rows: Sequence[Sequence[EncodedRow]], input_ids: Sequence[NDArray[np.int32]]) -> dict[str, Any]:
    """The columns `SCHEMA` of rows of one or several documents; `input_ids`: what is kept of each row's tokens."""

    def lists(arrays: Sequence[NDArray[Any]], kind: Any = np.int32) -> pa.ListArray:
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, np.concatenate(arrays) if arrays else np.zeros(0, dtype=kind))

    def spans(name: str) -> list[NDArray[Any]]:
        return [np.concatenate([getattr(document, name) for document in row]) for row in rows]

    first = [row[0].row for row in rows]
    trained = [[a for d in row for a in (d.input_ids, d.span_start, d.span_end, d.span_weight)] for row in rows]
    return {
        "input_ids": lists(input_ids),
        "span_start": lists(spans("span_start")),
        "span_end": lists(spans("span_end")),
        "span_weight": lists(spans("span_weight"), np.float32),
        "row_weight": [row.weight for row in first],
        "length": [sum(len(document.input_ids) for document in row) for row in rows],
        "targets": [sum(document.targets for document in row) for row in rows],
        "source": [row.source for row in first],
        "origin": [row.origin for row in first],
        "language": [row.language for row in first],
        "row_hash": [row_hash(of, float(np.float32(row.weight))) for of, row in zip(trained, first, strict=True)],
    }


def record_batch(columns: Mapping[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    """Columns by name as one Arrow batch."""
    return pa.RecordBatch.from_arrays([pa.array(columns[f.name], type=f.type) for f in schema], schema=schema)
