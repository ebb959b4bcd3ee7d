"""Where rows come from: JSON, JSONL, parquet, Arrow, text (packed too), folders of them, hub ids, remote files.

Reading is split in two so that it can be shared by processes: `Source.blocks` only cuts the input into pieces of raw
records (about as fast as the disk), `parse_block` turns a piece into dicts and runs wherever the piece was sent.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ds_longft.config.endings import LINES, SUFFIXES, TABLES, suffix_of
from ds_longft.config.run_config import SourceConfig
from ds_longft.data.files import is_member, is_remote, local_files
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


@dataclass(frozen=True)
class Block:
    """A run of consecutive records of one file, not parsed yet."""

    file: str
    first: int  # number of the first record, from 1
    records: list[Record] | list[Any] | pa.RecordBatch  # a BadRow where a record could not even be cut out
    position_bytes: int  # how far into the whole source reading has come, for the progress bar


@dataclass(frozen=True)
class Place:
    """Where reading a source stands."""

    file: int = 0
    block: int = 0  # of that file, the next one
    records: int = 0  # of a remote set, read so far
    state: dict[str, Any] | None = None  # of a remote set that is read as a stream


START = Place()


@dataclass(frozen=True)
class Source:
    """A source that was found: local files, a hub set already fetched to the local cache, or one to be streamed."""

    config: SourceConfig
    files: tuple[Path, ...]
    hub: Any = None  # datasets.Dataset or IterableDataset
    remark: str = ""  # what of it is not read

    @property
    def size_bytes(self) -> int:
        """Bytes on disk; 0 for a hub set."""
        return sum(file.stat().st_size for file in self.files)

    def identity(self) -> list[Any]:
        """What tells this data from other data without reading it: path, size and both times of each file.

        The time of the last change of any kind as well: `touch -r` and `rsync -t` set back the other one. Here a file
        too many is taken for a new one; whether a run may go on is a question of its rows (`TokenizedSet.content`).
        """
        if self.hub is not None:
            named = [self.config.path, self.config.split, self.config.subset, self.config.revision]
            return [*named, getattr(self.hub, "_fingerprint", "streamed")]
        stats = [(file, file.stat()) for file in self.files]
        return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in stats]

    def blocks(self) -> Iterator[Block]:
        """All records in order, cut into blocks, at most `limit` records."""
        return _limited((block for block, _ in self.blocks_from(START)), self.config.limit)

    def blocks_from(self, place: Place) -> Iterator[tuple[Block, Place]]:
        """The blocks from a place on, each with the place behind it. What lies before it in its file is read again."""
        if self.hub is not None:
            yield from _record_batches(f"{self.config.path}[{self.config.split}]", self.hub, place)
        before = sum(file.stat().st_size for file in self.files[: place.file])
        for number, file in enumerate(self.files[place.file :], place.file):
            done = place.block if number == place.file else 0
            try:
                for count, block in enumerate(islice(_file_blocks(file, before), done, None), done + 1):
                    yield block, Place(number, count)
            except (OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException) as error:
                raise DataError(f"{file} cannot be read: {error}; is the file complete?") from error
            before += file.stat().st_size


def find_source(config: SourceConfig, *, streaming: bool = False) -> Source:
    """Files of a local path or pattern, remote files, or the hub set of that id.

    `streaming`: what is not local is read as it is needed, and not fetched.

    Raises:
        DataError: there is none of them; it names what was looked for.
    """
    if is_remote(config.path):
        return Source(config, (), _load_remote(config, streaming))
    files = local_files(config)
    if files is not None:
        return Source(config, files.read, remark=files.remark)
    path = Path(config.path)
    if path.is_absolute() or config.path.startswith((".", "~")) or suffix_of(path) in SUFFIXES or not config.path:
        raise DataError(f"no such file or folder: {config.path!r} (data.train[].path or data.eval[].path)")
    return Source(config, (), _load_hub(config, streaming))


def _load_remote(config: SourceConfig, streaming: bool) -> Any:
    """Files that fsspec finds (s3://, gs://, hf://, https://), fetched to the local cache of `datasets` or streamed."""
    import datasets  # heavy, and not needed for local files

    kinds = {".parquet": "parquet", ".arrow": "arrow", ".txt": "text"} | dict.fromkeys(LINES, "json")
    kind = kinds.get(suffix_of(Path(config.path)))
    if kind is None:
        raise DataError(
            f"{config.path} has an unknown ending: expected one or several files of {', '.join(kinds)}, e.g. "
            "s3://bucket/folder/*.parquet"
        )
    more = {"sample_by": "document"} if kind == "text" else {}
    try:
        return datasets.load_dataset(kind, data_files=config.path, split="train", streaming=streaming, **more)
    except Exception as error:  # every file system raises errors of its own
        raise DataError(f"{config.path!r} cannot be read: {_first_lines(error)}") from error


def _load_hub(config: SourceConfig, streaming: bool) -> Any:
    import datasets  # heavy, and not needed for local files

    given = {"name": config.subset, "revision": config.revision}
    keys: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    keys |= {"streaming": True} if streaming else {}
    try:
        try:
            return datasets.load_dataset(config.path, split=config.split, **keys)
        except ValueError:
            # Sets rename their parts over time: Fusang-v1 has had `long` as a split and as a configuration.
            if config.subset or config.split not in datasets.get_dataset_config_names(config.path):
                raise
            return datasets.load_dataset(config.path, config.split, split="train", **keys)
    except Exception as error:  # the hub client raises errors of many libraries
        asked = f"split {config.split!r}, subset {config.subset!r}"
        raise DataError(
            f"{config.path!r} is no local file or folder, and as a hub id ({asked}) it cannot be loaded: "
            f"{_first_lines(error)}. data.train[].subset chooses a configuration, split a split. Without a network: "
            f"`hf download {config.path} --repo-type dataset --local-dir FOLDER` where there is one, and give the "
            "folder; HF_HUB_OFFLINE=1 ends the retries. A gated set wants `hf auth login`"
        ) from error


def _first_lines(error: Exception) -> str:
    """The error and the lines behind it, in which the hub client lists what there is."""
    return " ".join([f"{type(error).__name__}:", *str(error).split("\n")[:4]])[:600]


def parse_block(block: Block) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(origin, record) of each record of a block; a record that cannot be parsed comes as a `BadRow`."""
    records = _plain(block.records) if isinstance(block.records, pa.RecordBatch) else block.records
    for number, record in enumerate(records, start=block.first):
        if _is_blank(record):
            continue
        yield f"{block.file}:{number}", _parse(record)


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


def first_record(source: Source) -> dict[str, Any]:
    """The first readable record of a source, whose columns give its layout away. Raises `DataError`: there is none."""
    for block in source.blocks():
        for _, record in parse_block(block):
            if isinstance(record, dict):
                return record
    raise DataError(
        f"{source.config.path} (data.train or data.eval) holds no readable row: expected one JSON object a line, "
        "a JSON array or parquet"
    )


def read_rows(config: SourceConfig) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """Every record of a source in order, in this process. Memory stays flat for JSONL and parquet."""
    for block in find_source(config).blocks():
        yield from parse_block(block)


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


def _file_blocks(file: Path, before_bytes: int) -> Iterator[Block]:
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
    for record in _until_bomb(array_elements(stream) if is_array else lines(stream)):
        records.append(record)
        size += len(record) if isinstance(record, bytes) else 0
        if size >= BLOCK_BYTES:
            yield Block(name, first, records, 0)
            first, records, size = first + len(records), [], 0
    if records:
        yield Block(name, first, records, 0)


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


def _record_batches(name: str, hub: Any, place: Place) -> Iterator[tuple[Block, Place]]:
    tables, done = hub.with_format("arrow"), place.records
    if place.state is not None:
        tables.load_state_dict(place.state)
    elif done:
        tables = tables.skip(done)
    for table in tables.iter(batch_size=PARQUET_ROWS):
        state = tables.state_dict() if hasattr(tables, "state_dict") else None
        end = done + table.num_rows
        for batch in table.combine_chunks().to_batches():
            done += batch.num_rows
            yield Block(name, done - batch.num_rows + 1, batch, 0), Place(0, 0, done, state if done == end else None)


def _limited(blocks: Iterator[Block], limit: int | None) -> Iterator[Block]:
    """The first `limit` records; blank lines do not count."""
    left = limit
    for block in blocks:
        if left is None:
            yield block
            continue
        records = _plain(block.records) if isinstance(block.records, pa.RecordBatch) else block.records
        real = [i for i, record in enumerate(records) if not _is_blank(record)]
        if len(real) >= left:
            yield Block(block.file, block.first, list(islice(records, real[left - 1] + 1)), block.position_bytes)
            return
        left -= len(real)
        yield block
