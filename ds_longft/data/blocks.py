"""A file in blocks of raw records, and a block as dicts.

Cutting is about as fast as the disk; parsing runs wherever the block was sent.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ds_longft.config.endings import TABLES, suffix_of
from ds_longft.data.files import is_member
from ds_longft.data.records import (
    MAX_EXPANSION,
    MAX_RECORD_BYTES,
    Bomb,
    Metered,
    Record,
    array_elements,
    lines,
    too_large,
)
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError

BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 64  # rows of a parquet block: long documents make wide rows


SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Block:
    """A run of consecutive records of one file, not parsed yet."""

    file: str
    first: int  # number of the first record, from 1
    records: list[Record] | list[Any] | pa.RecordBatch  # a BadRow where a record could not even be cut out
    position_bytes: int  # how far into the whole source reading has come, for the progress bar
    columns: Mapping[str, str] = field(default_factory=dict)  # `data.train[].columns`


@contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(stream of plain bytes, stream whose position tells how much of the file is read)."""
    kind = file.suffix.lower()
    with file.open("rb") as raw:
        if kind in (".gz", ".tgz"):
            with gzip.open(raw, "rb") as plain:
                yield plain, raw  # type: ignore[misc]
        elif kind in (".bz2", ".lz4", ".zst"):
            codec = {".bz2": "bz2", ".lz4": "lz4", ".zst": "zstd"}[kind]
            with pa.CompressedInputStream(raw, codec) as unpacked:
                yield io.BufferedReader(unpacked), raw
        else:
            yield raw, raw


def file_blocks(file: Path, before_bytes: int) -> Iterator[Block]:
    """All blocks of a file that begins `before_bytes` into its source. Raises what the file's format raises."""
    with _opened(file) as (stream, raw):
        kind = suffix_of(file)
        if kind in TABLES:
            yield from _table_blocks(file, stream, before_bytes)
        elif kind in (".tar", ".tgz"):
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    inner = archive.extractfile(member) if member.isfile() and is_member(member.name) else None
                    if inner is not None:
                        name = f"{file}:{member.name}"
                        for block in _record_blocks(
                            name, suffix_of(Path(member.name)), Metered(inner, file.stat().st_size)
                        ):
                            yield replace(block, position_bytes=before_bytes + raw.tell())
        else:
            packed_bytes = None if stream is raw else file.stat().st_size
            for block in _record_blocks(str(file), kind, Metered(stream, packed_bytes)):
                yield replace(block, position_bytes=before_bytes + raw.tell())


def _record_blocks(name: str, kind: str, stream: Metered) -> Iterator[Block]:
    """Blocks of raw records; a text file is one record."""
    if kind == ".txt":
        text = stream.read(MAX_RECORD_BYTES + 1)
        record = too_large(len(text)) if len(text) > MAX_RECORD_BYTES else _as_row(text)
        yield Block(name, 1, [record], 0)
        return
    is_array = kind == ".json" and stream.first_byte() == b"["
    first, records, size = 1, [], 0
    if kind in SEPARATORS:
        cut = _csv_records(stream, SEPARATORS[kind])
    else:
        cut = array_elements(stream) if is_array else lines(stream)
    for record in _until_bomb(cut):
        records.append(record)
        size += len(record) if isinstance(record, bytes) else 0
        if size >= BLOCK_BYTES:
            yield Block(name, first, records, 0)
            first, records, size = first + len(records), [], 0
    if records:
        yield Block(name, first, records, 0)


def _csv_records(stream: Metered, separator: str) -> Iterator[Record]:
    """Rows of a file whose first line names the columns. All values are texts; an empty one is no value."""
    csv.field_size_limit(MAX_RECORD_BYTES)  # the library's own limit is a short text
    text = (line.decode("utf-8-sig") for line in iter(lambda: stream.readline(MAX_RECORD_BYTES), b""))
    try:
        for row in csv.DictReader(text, delimiter=separator, strict=True):
            if None in row:
                yield BadRow("more values than columns", f"{len(row)} columns are named in the first line")
            else:
                yield json.dumps({column: value for column, value in row.items() if value}).encode()
    except (UnicodeDecodeError, csv.Error) as error:
        yield BadRow("the rest of the file is no CSV", str(error))


def _as_row(text: bytes) -> Record:
    try:
        return json.dumps({"text": text.decode("utf-8-sig")}).encode()
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", str(error))


def _until_bomb(records: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from records
    except Bomb:
        yield BadRow("the rest of the file is a zip bomb", f"it unpacks to over {MAX_EXPANSION} times its size")


def _table_blocks(file: Path, stream: IO[bytes], before_bytes: int) -> Iterator[Block]:
    with tempfile.TemporaryFile() as plain:
        if file.suffix.lower() not in TABLES:  # tables are read from their end: unpack to disk, not to memory
            _unpack(Metered(stream, file.stat().st_size), plain, file)
            stream = plain
        first, size = 1, file.stat().st_size
        for batch, total in _batches(stream, suffix_of(file)):
            first += batch.num_rows
            done = size * (first - 1) // max(total, first - 1, 1)
            yield Block(str(file), first - batch.num_rows, batch, before_bytes + done)


def _batches(stream: IO[bytes], kind: str) -> Iterator[tuple[pa.RecordBatch, int]]:
    """(batch of few rows, rows of the whole table as far as they are known)."""
    if kind == ".parquet":
        table = pq.ParquetFile(stream)
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            yield batch, table.metadata.num_rows
        return
    try:
        reader: Any = pa.ipc.open_file(stream)  # feather
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:  # `datasets` writes a stream
        stream.seek(0)
        batches = pa.ipc.open_stream(stream)
    for whole in batches:
        for at in range(0, whole.num_rows, PARQUET_ROWS):
            yield whole.slice(at, PARQUET_ROWS), 0


def _unpack(stream: Metered, plain: IO[bytes], file: Path) -> None:
    try:
        while chunk := stream.read(BLOCK_BYTES):
            plain.write(chunk)
    except Bomb:
        raise DataError(f"{file} unpacks to over {MAX_EXPANSION} times its size: it is no data") from None


def limited(blocks: Iterator[Block], limit: int | None) -> Iterator[Block]:
    """The first `limit` records; blank lines do not count."""
    left = limit
    for block in blocks:
        if left is None:
            yield block
            continue
        records = _plain(block.records) if isinstance(block.records, pa.RecordBatch) else block.records
        real = [i for i, record in enumerate(records) if not _is_blank(record)]
        if len(real) >= left:
            yield replace(block, records=list(islice(records, real[left - 1] + 1)))
            return
        left -= len(real)
        yield block


def parse_block(block: Block) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(origin, record) of each record of a block; a record that cannot be parsed comes as a `BadRow`."""
    records = _plain(block.records) if isinstance(block.records, pa.RecordBatch) else block.records
    for number, record in enumerate(records, start=block.first):
        if _is_blank(record):
            continue
        row = _parse(record)
        yield f"{block.file}:{number}", _renamed(row, block.columns) if isinstance(row, dict) else row


def _renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any] | BadRow:
    """The row with the columns of a layout in place of its own. One that has both would lose one of them."""
    twice = [ours for theirs, ours in columns.items() if theirs in row and ours in row and ours not in columns]
    if twice:
        return BadRow("data.train[].columns names a column that the row has too", ", ".join(twice))
    return {columns.get(key, key): value for key, value in row.items()}


def _plain(batch: pa.RecordBatch) -> list[Any]:
    """Records of a batch as dicts; those that hold what Python cannot (text that is no UTF-8) as `BadRow`."""
    try:
        return [_without_nulls(record) for record in batch.to_pylist()]
    except (ValueError, OverflowError, pa.ArrowException):
        pass
    records: list[Any] = []
    for number in range(batch.num_rows):
        try:
            records += map(_without_nulls, batch.slice(number, 1).to_pylist())
        except (ValueError, OverflowError, pa.ArrowException) as error:
            records.append(BadRow("not UTF-8" if isinstance(error, UnicodeDecodeError) else "unreadable", str(error)))
    return records


def _without_nulls(value: Any) -> Any:
    """A value of a table without the keys that objects of other rows have: all of a column share one type there."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _is_blank(record: Any) -> bool:
    return isinstance(record, bytes) and (not record or record.isspace())


def _parse(record: Any) -> dict[str, Any] | BadRow:
    if isinstance(record, BadRow):
        return record
    if isinstance(record, bytes):
        try:
            record = json.loads(record.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
        except UnicodeDecodeError as error:
            return BadRow("not UTF-8", str(error))
        except (ValueError, RecursionError) as error:
            return BadRow("broken JSON", str(error))
        except BadRow as bad:
            return bad
    return record if isinstance(record, dict) else BadRow("not an object", f"seen {type(record).__name__}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise BadRow("a key twice in one object", ", ".join(twice))
    return row
