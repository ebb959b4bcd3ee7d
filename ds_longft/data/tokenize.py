"""Sources -> a tokenized set on disk, by as many processes as there are cores, kept under a fingerprint.

The calling process only cuts the input into blocks and writes the results in order; parsing, templating and
tokenising happen in the workers. A few blocks per worker are under way at a time: memory does not grow with the data.
Results are written in parts: a process that was killed costs one part, the next call goes on behind the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock

from ds_longft.config.data_keys import DataConfig, SourceConfig
from ds_longft.data.cache import LEDGER, PartSeal, SealedSet, close_set, part_file, sealed_set, whole_parts
from ds_longft.data.encode import Encoder, Overlong, without_trimmed_offsets
from ds_longft.data.encode_blocks import Result, RowKind, Task, encoded_blocks
from ds_longft.data.formats import detect_format
from ds_longft.data.ledger import Ledger
from ds_longft.data.preferences import PREFERENCE, check_columns
from ds_longft.data.progress import Progress, say_once
from ds_longft.data.readers import Source, find_source, first_record
from ds_longft.data.template_source import load_template
from ds_longft.data.tokenized import TokenizedSet
from ds_longft.errors import ConfigError, DataError
from ds_longft.stored import Unreadable

LAYOUT_VERSION = 5  # raise it when the same input gives other tokens, spans or columns
PART_BLOCKS = 64  # of about 1 MB each: what a killed process may have to do again


@dataclass(frozen=True)
class Input:
    """What is tokenized, and by which rules."""

    sources: tuple[Source, ...]
    formats: tuple[str, ...]  # of each source
    encoder: Encoder

    @classmethod
    def of(
        cls,
        sources: Sequence[SourceConfig],
        tokenizer: Any,
        data: DataConfig,
        *,
        progress: bool = False,
        pairs: bool = False,
        streaming: bool = False,
    ) -> Input:
        """Find the sources and their layouts. Raises as `tokenize_sources` does."""
        if not sources:
            raise DataError("data.train is empty: give at least one source, e.g. data.train: [{path: my.jsonl}]")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise DataError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: the model folder needs a tokenizer.json"
            )
        found = [find_source(source, streaming=streaming) for source in sources]
        if progress:
            for source in found:
                if source.remark:
                    say_once(source.remark)
        formats = [_format_of(source, pairs) for source in found]
        chats = any(name != "text" for name in formats)
        encoder = _encoder(tokenizer, data, chats=chats)
        if progress and chats and encoder.template is not None:
            for remark in encoder.template.remarks:
                say_once(remark)
        return cls(tuple(found), tuple(formats), encoder)

    @property
    def rows(self) -> type[TokenizedSet]:
        """The kind of all rows."""
        return RowKind.of(self.formats[0]).tokenized

    def opened(self, folder: Path, sealed: SealedSet) -> TokenizedSet:
        """The set of this input in a folder."""
        return self.rows.open([folder / part.file for part in sealed.parts], folder.name, sealed.tally)

    @property
    def size_bytes(self) -> int:
        """Size of the files; 0 where they lie elsewhere."""
        return sum(source.size_bytes for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Names this input: tokenizer, template, files, settings. Equal fingerprints mean equal tokens."""
        return self.digest([[s.identity(), s.config.limit, s.config.path] for s in self.sources])

    def digest(self, files: Any) -> str:
        """Names tokenizer, template and settings, together with whatever names the files."""
        encoder, template = self.encoder, self.encoder.template
        columns = [source.config.columns for source in self.sources]
        settings = {
            "layout": LAYOUT_VERSION,
            "tokenizer": encoder.tokenizer.to_str(),
            "eos_id": encoder.eos_id,
            "template": template and [template.source, sorted(template.variables.items()), template.turn_ends],
            "sources": [self.formats, files, *([columns] if any(columns) else [])],
            "max_length_tokens": encoder.max_length_tokens,
            "overlong": encoder.overlong,
            "turns": [encoder.thinking, encoder.train_turns],
            **({"weighting": "gain"} if encoder.by_gain else {}),
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]

    def tasks(self) -> Iterator[tuple[int, Task]]:
        """All blocks in their order, each with its position in bytes."""
        before_bytes = 0
        for source, name in zip(self.sources, self.formats, strict=True):
            for block in source.blocks():
                yield before_bytes + block.position_bytes, Task(block, name, source.config.path)
            before_bytes += source.size_bytes


def tokenize_sources(
    sources: Sequence[SourceConfig],
    tokenizer: Any,
    data: DataConfig,
    *,
    progress: bool = False,
    pairs: bool = False,
    every_byte: bool = False,
) -> TokenizedSet:
    """Tokenize sources, one after the other, or open the tokenized set of an earlier call with the same input.

    Args:
        sources: where the rows come from.
        tokenizer: a fast Hugging Face tokenizer.
        data: `max_length_tokens`, `overlong`, `chat_template`, `workers`, `cache_dir`, `max_bad_fraction` are read.
        progress: show a bar on a terminal, or a line every few seconds elsewhere, and what is odd in the template.
        pairs: the rows are preference pairs; the result is a `PairSet`.
        every_byte: see by their hashes that the parts of an earlier call are whole, and not only by their sizes.

    Raises:
        DataError: nothing found or usable, too many bad rows, or a row too long with `overlong: error`.
        ConfigError: no chat template, or one that does not show where the answers are.
    """
    found = Input.of(sources, tokenizer, data, progress=progress, pairs=pairs)
    cache = Path(data.cache_dir).expanduser()
    folder = cache / found.fingerprint
    try:
        sealed = sealed_set(folder, every_byte=every_byte)
    except Unreadable:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"data.cache_dir {data.cache_dir} cannot be made: {error.strerror or error}") from None
        with FileLock(cache / f"{folder.name}.lock"):  # a second process waits, and finds the set made
            sealed = _make(folder, found, data.workers, progress=progress, every_byte=every_byte)
    sealed.tally.check(data.max_bad_fraction, folder / LEDGER)
    if progress and (remark := sealed.tally.unused_remark()):
        say_once(remark)
    return found.opened(folder, sealed)


def tokenized_already(
    sources: Sequence[SourceConfig], tokenizer: Any, data: DataConfig, *, pairs: bool = False
) -> TokenizedSet | None:
    """The set that `tokenize_sources` made of this input; None where it has not yet. Raises as that does."""
    found = Input.of(sources, tokenizer, data, pairs=pairs)
    folder = Path(data.cache_dir).expanduser() / found.fingerprint
    try:
        return found.opened(folder, sealed_set(folder, every_byte=False))
    except Unreadable:
        return None


def _make(folder: Path, found: Input, workers: int | None, *, progress: bool, every_byte: bool) -> SealedSet:
    """The set at `folder`, made now unless another process just did; a damaged one is said and made again."""
    if folder.exists():
        try:
            return sealed_set(folder, every_byte=every_byte)
        except Unreadable as damage:
            print(f"the tokenized set {folder} is damaged, and is made again: {damage}", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    write_set(partial, found.tasks(), found, found.size_bytes, workers=workers, progress=progress)
    partial.rename(folder)
    return sealed_set(folder, every_byte=False)


def _encoder(tokenizer: Any, data: DataConfig, *, chats: bool) -> Encoder:
    """`chats`: whether a source begins with one. One that begins with plain text may hold some too."""
    try:
        template = load_template(tokenizer, data.chat_template)
    except ConfigError:
        if chats or data.chat_template is not None:
            raise
        template = None  # plain text needs none
    backend = without_trimmed_offsets(tokenizer.backend_tokenizer)  # a copy of our own
    backend.no_truncation()
    backend.no_padding()
    return Encoder(
        tokenizer=backend, template=template,
        eos_id=tokenizer.eos_token_id, max_length_tokens=data.max_length_tokens, overlong=data.overlong,
        thinking=data.thinking, train_turns=data.train_turns, by_gain=data.weighting == "gain",
    )  # fmt: skip


def _format_of(source: Source, pairs: bool) -> str:
    """The layout of a source: as configured, or recognised by its first readable row."""
    if source.config.format != "auto":
        return source.config.format
    record = first_record(source)
    if pairs:
        check_columns(record, source.config.path)
        return PREFERENCE
    return detect_format(record, source.config.path)


def write_set(
    folder: Path,
    tasks: Iterable[tuple[int, Task]],
    found: Input,
    size_bytes: int,
    *,
    workers: int | None,
    progress: bool,
) -> None:
    """Encode blocks (each with its position) into parts of `PART_BLOCKS` blocks, in their order; parts already there
    are kept.

    A process that is killed or interrupted, or whose disk is full, leaves its whole parts. Whatever else goes wrong
    would go wrong again, and leaves nothing behind.
    """
    folder.mkdir(exist_ok=True)
    whole = whole_parts(folder)
    try:
        with Progress("tokenising", size_bytes, show=progress) as bar:
            numbered = ((i // PART_BLOCKS, *task) for i, task in enumerate(tasks))
            new = (task for task in numbered if task[0] not in whole)
            for part, of_part in groupby(encoded_blocks(new, found.encoder, workers, size_bytes), key=itemgetter(0)):
                _write_part(folder, part, ((at, result) for _, at, result in of_part), bar, found.rows.schema)
        close_set(folder)
    except Overlong as too_long:
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(
            f"{too_long}: data.overlong is error. Raise data.max_length_tokens, or set data.overlong to drop or "
            "truncate"
        ) from too_long
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising process was killed, mostly for lack of memory: lower data.workers and start again, what is "
            "done is kept"
        ) from error
    except OSError as error:
        raise DataError(
            f"tokenising stopped: {error}. If the disk is full, make room in {folder.parent} and start again, what is "
            "done is kept; or set data.cache_dir to a larger disk"
        ) from error
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_part(
    folder: Path, part: int, results: Iterable[tuple[int, Result]], bar: Progress, schema: pa.Schema
) -> None:
    rows = folder / part_file(part)
    with (
        pa.OSFile(str(rows), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
        Ledger(folder / f"ledger-{part:05d}.jsonl") as ledger,
    ):
        for position_bytes, result in results:
            ledger.tally += result.tally
            for entry in result.left_out:
                ledger.add(entry)
            if result.batch.num_rows:
                writer.write_batch(result.batch)
            bar.update(position_bytes, f"{ledger.tally.usable:,} rows of part {part + 1}")
    SealedSet(ledger.tally, [PartSeal.of(rows, ledger.tally.usable)]).write(folder / f"tally-{part:05d}.json")
