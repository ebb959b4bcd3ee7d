"""Where rows come from: JSON, JSONL, parquet (.gz too), folders of them, hub ids.

Reading is split in two so that it can be shared by processes: `Source.blocks` only cuts the input into pieces of raw
records (about as fast as the disk), `parse_block` turns a piece into dicts and runs wherever the piece was sent.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ds_longft.config import SourceConfig, is_pattern
from ds_longft.data.records import MAX_EXPANSION, Bomb, Metered, Record, array_elements, lines
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
UNREAD = {".zst", ".bz2", ".xz", ".zip", ".csv", ".tsv", ".arrow"}  # data too, in a form not read here
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
class Source:
    """A source that was found: local files, or a hub set already fetched to the local cache."""

    config: SourceConfig
    files: tuple[Path, ...]
    hub: Any = None  # datasets.Dataset

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
            return [self.config.path, self.config.split, self.hub._fingerprint]
        stats = [(file, file.stat()) for file in self.files]
        return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in stats]

    def blocks(self) -> Iterator[Block]:
        """All records in order, cut into blocks, at most `limit` records."""
        return _limited(self._all_blocks(), self.config.limit)

    def _all_blocks(self) -> Iterator[Block]:
        if self.hub is not None:
            yield from _record_batches(f"{self.config.path}[{self.config.split}]", self.hub)
        before = 0
        for file in self.files:
            try:
                yield from _file_blocks(file, before)
            except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
                raise DataError(f"{file} cannot be read: {error}; is the file complete?") from error
            before += file.stat().st_size


def _readable(files: Iterable[Path]) -> list[Path]:
    """Those of a known ending. Raises `DataError` where data lies among them that would go untrained unseen."""
    found = list(files)
    unread = [p for p in found if {p.suffix.lower(), _suffix(p)} & UNREAD]
    if unread:
        names = ", ".join(p.name for p in unread[:5]) + " ..." * (len(unread) > 5)
        raise DataError(
            f"{unread[0].parent} holds data that cannot be read: {names}. "
            f"Expected {', '.join(SUFFIXES)} (.gz too): convert or unpack these, or move them elsewhere"
        )
    return [p for p in found if _suffix(p) in SUFFIXES]


def find_source(config: SourceConfig) -> Source:
    """Files of a local path or pattern, or the hub set of that id.

    Raises `DataError` when there is neither, naming what was looked for.
    """
    path = Path(config.path).expanduser()
    if is_pattern(config.path) and not path.exists():
        files = _readable(Path(p) for p in sorted(glob(str(path))))
        if not files:
            raise DataError(f"no file fits {config.path!r}: expected {', '.join(SUFFIXES)} (.gz too)")
        return Source(config, tuple(files))
    if path.is_dir():
        files = _readable(sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != "."))
        if not files:
            raise DataError(f"the folder {path} holds no data: expected {', '.join(SUFFIXES)} (.gz too)")
        return Source(config, tuple(files))
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise DataError(f"{path} has an unknown ending: expected {', '.join(SUFFIXES)} (.gz too)")
        return Source(config, (path,))
    if path.is_absolute() or config.path.startswith((".", "~")) or _suffix(path) in SUFFIXES or not config.path:
        raise DataError(f"no such file or folder: {config.path!r} (data.train[].path or data.eval[].path)")
    return Source(config, (), _load_hub(config))


def _load_hub(config: SourceConfig) -> Any:
    import datasets  # heavy, and not needed for local files

    try:
        try:
            return datasets.load_dataset(config.path, split=config.split)
        except ValueError:
            # Sets rename their parts over time: Fusang-v1 has had `long` as a split and as a configuration.
            if config.split not in datasets.get_dataset_config_names(config.path):
                raise
            return datasets.load_dataset(config.path, config.split, split="train")
    except Exception as error:  # the hub client raises errors of many libraries
        raise DataError(
            f"{config.path!r} is no local file or folder, and as a hub id (split {config.split!r}) it cannot be "
            f"loaded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


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
        return list(batch.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):
        pass
    records: list[Any] = []
    for number in range(batch.num_rows):
        try:
            records += batch.slice(number, 1).to_pylist()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            records.append(BadRow("not UTF-8" if isinstance(error, UnicodeDecodeError) else "unreadable", str(error)))
    return records


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


def _suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


@contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(stream of plain bytes, stream whose position tells how much of the file is read)."""
    with file.open("rb") as raw:
        if file.suffix.lower() != ".gz":
            yield raw, raw
        else:
            with gzip.open(raw, "rb") as plain:
                yield plain, raw  # type: ignore[misc]


def _file_blocks(file: Path, before_bytes: int) -> Iterator[Block]:
    with _opened(file) as (stream, raw):
        if _suffix(file) == ".parquet":
            yield from _parquet_blocks(file, stream, before_bytes)
            return
        is_array = _suffix(file) == ".json" and _first_byte(stream) == b"["
        metered = Metered(stream, file.stat().st_size if file.suffix.lower() == ".gz" else None)
        first, records, size = 1, [], 0
        for record in _until_bomb(array_elements(metered) if is_array else lines(metered)):
            records.append(record)
            size += len(record) if isinstance(record, bytes) else 0
            if size >= BLOCK_BYTES:
                yield Block(str(file), first, records, before_bytes + raw.tell())
                first, records, size = first + len(records), [], 0
        if records:
            yield Block(str(file), first, records, before_bytes + raw.tell())


def _until_bomb(records: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from records
    except Bomb:
        yield BadRow("the rest of the file is a zip bomb", f"it unpacks to over {MAX_EXPANSION} times its size")


def _first_byte(stream: IO[bytes]) -> bytes:
    head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    stream.seek(0)
    return head


def _parquet_blocks(file: Path, stream: IO[bytes], before_bytes: int) -> Iterator[Block]:
    with tempfile.TemporaryFile() as plain:
        if file.suffix.lower() == ".gz":  # parquet is read from its end: unpack to disk, not to memory
            _unpack(Metered(stream, file.stat().st_size), plain, file)
            stream = plain
        table = pq.ParquetFile(stream)
        first, total, size = 1, max(table.metadata.num_rows, 1), file.stat().st_size
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            first += batch.num_rows
            yield Block(str(file), first - batch.num_rows, batch, before_bytes + size * (first - 1) // total)


def _unpack(stream: Metered, plain: IO[bytes], file: Path) -> None:
    try:
        while chunk := stream.read(BLOCK_BYTES):
            plain.write(chunk)
    except Bomb:
        raise DataError(f"{file} unpacks to over {MAX_EXPANSION} times its size: it is no data") from None


def _record_batches(name: str, hub: Any) -> Iterator[Block]:
    first = 1
    for table in hub.with_format("arrow").iter(batch_size=PARQUET_ROWS):
        for batch in table.combine_chunks().to_batches():
            yield Block(name, first, batch, 0)
            first += batch.num_rows


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
