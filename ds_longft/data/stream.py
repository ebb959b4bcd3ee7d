"""A training set read as a stream of windows: each a small tokenized set, made while the one before is trained.

Only what is being trained lies on disk in tokens, whatever the size of the set. A window is decided by the order of the
files and their content alone, so that every rank, and a run that goes on, has the same one without communication;
where each begins is noted, so that going on does not read the set from its beginning.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from ds_longft.batch import Pack, Step
from ds_longft.config.data_keys import DataConfig
from ds_longft.data.blocks import Block
from ds_longft.data.cache import LEDGER, sealed_set
from ds_longft.data.encode_blocks import Task
from ds_longft.data.loader import StepLoader
from ds_longft.data.pack import build_pack
from ds_longft.data.readers import START, Place
from ds_longft.data.tokenize import Input, write_set
from ds_longft.data.tokenized import TokenizedRow, TokenizedSet
from ds_longft.errors import DataError
from ds_longft.stored import Unreadable, read_if_good

MIB = 1 << 20


@dataclass(frozen=True)
class Begin:
    """Where a window begins: a place in one of the sources. Behind the last source: at the first one again."""

    source: int = 0
    place: Place = START


class Stream:
    """The windows of a training set, by their numbers from 0; behind the end of the set it begins again.

    Processes that share `data.cache_dir` share its windows: one makes a window, the others wait for it.
    """

    def __init__(self, found: Input, data: DataConfig, vocab: int | None = None) -> None:
        """`vocab`: token ids that the model knows, where they are to be checked."""
        assert data.stream_window_mib is not None, "only such a set is a stream"
        self._found, self._data, self._vocab = found, data, vocab
        self._window_bytes = data.stream_window_mib * MIB
        self.folder = Path(data.cache_dir).expanduser() / f"stream-{found.fingerprint}-{data.stream_window_mib}"
        files: list[Any] = [
            source.identity() if source.hub is not None else [[file.name, file.stat().st_size] for file in source.files]
            for source in found.sources
        ]
        self.content = found.digest(files)
        """Names the set without reading it: tokenizer, settings, names and sizes of the files in their order."""
        self._stands_at = Begin()
        self._reader: tuple[Begin, Iterator[tuple[Block, str, str, Begin]]] | None = None

    def window(self, number: int) -> TokenizedSet:
        """A window, made now unless it is there.

        Raises:
            DataError: tokens that the model does not know; of the first window also: nothing usable in it, or too many
                bad rows. Of later ones that is a warning, and what is usable is trained.
        """
        folder = self.folder / f"window-{number:06d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            try:
                sealed = sealed_set(folder, every_byte=False)
            except Unreadable:
                shutil.rmtree(folder, ignore_errors=True)
                self._make(number, folder)
                sealed = sealed_set(folder, every_byte=False)
            made = TokenizedSet.open([folder / part.file for part in sealed.parts], folder.name, sealed.tally)
        try:
            sealed.tally.check(self._data.max_bad_fraction, folder / LEDGER)
        except DataError as error:
            if number == 0:
                raise
            warnings.warn(f"window {number} of the stream: {error}", stacklevel=2)  # no reason to end a run
        if self._vocab is not None:
            made.check_ids(self._vocab)
        return made

    def forget(self, before: int) -> None:
        """Delete the windows before number `before`; their ledgers go into one."""
        numbers = {folder: int(folder.name.removeprefix("window-")[:6]) for folder in self.folder.glob("window-*")}
        old = sorted(folder for folder, number in numbers.items() if number < before)
        if not old:
            return  # without waiting for a window that is being made
        with FileLock(self.folder / ".lock"), (self.folder / LEDGER).open("ab") as ledger:
            for folder in old:
                if (folder / LEDGER).exists():
                    ledger.write((folder / LEDGER).read_bytes())
                shutil.rmtree(folder, ignore_errors=True)

    def _make(self, number: int, folder: Path) -> None:
        noted = self.folder / "begins.json"
        begins = read_if_good(noted, dict[int, Begin]) or {0: Begin()}
        last = max(n for n in begins if n <= number)
        for behind in range(last + 1, number + 1):  # the notes are lost: the windows before are read, not tokenized
            for _ in self._cut(begins[behind - 1]):
                pass
            begins[behind] = self._stands_at
        partial = folder.with_name(f"{folder.name}.partial")
        tasks = self._cut(begins[number])
        write_set(partial, tasks, self._found, self._window_bytes, workers=self._data.workers, progress=False)
        partial.rename(folder)
        begins[number + 1] = self._stands_at
        new = noted.with_suffix(".tmp")
        new.write_text(json.dumps({n: asdict(begin) for n, begin in begins.items()}))
        new.replace(noted)

    def _cut(self, begin: Begin) -> Iterator[tuple[int, Task]]:
        """The blocks of the window that begins there, each with its position in bytes; `_stands_at` is then its end.

        A window ends with the set: the next one begins at its start.
        """
        if begin.source == len(self._found.sources):
            begin = Begin()
        if self._reader is None or self._reader[0] != begin:
            self._reader = begin, self._blocks(begin)
        reader, size_bytes, at = self._reader[1], 0, begin
        self._reader = None  # until it stands at the end of this window
        for block, layout, path, behind in reader:
            size_bytes, at = size_bytes + _size_bytes(block), behind
            yield size_bytes, Task(block, layout, path)
            if size_bytes >= self._window_bytes:
                break
        else:
            at = Begin(len(self._found.sources))
        self._stands_at = at
        self._reader = at, reader

    def _blocks(self, begin: Begin) -> Iterator[tuple[Block, str, str, Begin]]:
        """(block, its layout, its source, place behind it)."""
        for number in range(begin.source, len(self._found.sources)):
            source, layout = self._found.sources[number], self._found.formats[number]
            for block, place in source.blocks_from(begin.place if number == begin.source else START):
                yield block, layout, source.config.path, Begin(number, place)


def _size_bytes(block: Block) -> int:
    if isinstance(block.records, pa.RecordBatch):
        return int(block.records.nbytes)
    return sum(len(record) for record in block.records if isinstance(record, bytes))


class StreamLoader(StepLoader):
    """Steps of a stream: what is an epoch of a set that is read whole is a window here."""

    def __init__(
        self, stream: Stream, *, first: int, longest_tokens: int, makes_windows: bool, **settings: Any
    ) -> None:
        """Beside what a `StepLoader` takes.

        Args:
            stream: where the windows come from.
            first: window to begin with.
            longest_tokens: of a pack, whatever rows may come.
            makes_windows: this process makes the next window ahead, and deletes old ones: one on each machine does.
        """
        self._stream, self._longest_tokens, self._makes_windows = stream, longest_tokens, makes_windows
        self._number = first
        super().__init__(stream.window(first), **settings)

    @property
    def _content(self) -> str:
        return self._stream.content

    def rows(self, epoch: int) -> TokenizedSet:
        """The rows of a window."""
        if epoch != self._number:
            started_s = time.perf_counter()
            self._take(self._stream.window(epoch))
            self._number = epoch
            self.wait_s += time.perf_counter() - started_s
        return self._tokenized

    def rows_name(self, epoch: int) -> str:
        """Names the stream and the window that is being trained."""
        return f"{self._content} {self.rows(epoch).content}"

    def steps(self, epoch: int, start: int = 0) -> Generator[Step]:
        """Steps of a window; the next one is made meanwhile."""
        self.rows(epoch)
        if self._makes_windows:
            self._stream.forget(epoch - 1)  # another machine may still read the one before
            name = f"ds_longft-window-{epoch + 1}"
            threading.Thread(target=self._make_ahead, args=(epoch + 1,), name=name, daemon=True).start()
        return super().steps(epoch, start)

    def _make_ahead(self, number: int) -> None:
        with suppress(Exception):  # it happens again where the window is needed, and is said there
            self._stream.window(number)

    def fullest_pack(self, epoch: int, *, of_a_side: bool = False) -> Pack:
        """A pack as full as any may be, all of it trained: nobody knows the rows to come."""
        ids = np.zeros(self._longest_tokens, dtype=np.int32)
        start, end, weight = np.asarray([0], np.int32), np.asarray([len(ids)], np.int32), np.ones(1, np.float32)
        row = TokenizedRow(0, ids, start, end, weight, row_weight=1.0, targets=len(ids) - 1)
        return build_pack([row], pad_to_multiple=self._sp, pad_id=self._pad_id, weighting="token")
