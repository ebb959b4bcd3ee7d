"""Where rows come from: JSON, JSONL, parquet, Arrow, text (packed too), folders of them, hub ids, remote files.

Reading is split in two so that it can be shared by processes: `Source.blocks` only cuts the input into pieces of raw
records, `blocks.parse_block` turns a piece into dicts and runs wherever the piece was sent.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.endings import LINES, SUFFIXES, suffix_of
from ds_longft.data.blocks import PARQUET_ROWS, Block, file_blocks, limited, parse_block
from ds_longft.data.files import is_remote, local_files
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError


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
        return limited((block for block, _ in self.blocks_from(START)), self.config.limit)

    def blocks_from(self, place: Place) -> Iterator[tuple[Block, Place]]:
        """The blocks from a place on, each with the place behind it. What lies before it in its file is read again."""
        return ((replace(block, columns=self.config.columns), behind) for block, behind in self._blocks_from(place))

    def _blocks_from(self, place: Place) -> Iterator[tuple[Block, Place]]:
        if self.hub is not None:
            yield from _record_batches(f"{self.config.path}[{self.config.split}]", self.hub, place)
        before = sum(file.stat().st_size for file in self.files[: place.file])
        for number, file in enumerate(self.files[place.file :], place.file):
            done = place.block if number == place.file else 0
            try:
                for count, block in enumerate(islice(file_blocks(file, before), done, None), done + 1):
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
