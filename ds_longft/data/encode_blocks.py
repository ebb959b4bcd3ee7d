"""Blocks of records -> tokens, in this process or in as many as there are cores, in the order of the blocks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import pyarrow as pa

from ds_longft.data.blocks import Block, parse_block
from ds_longft.data.encode import EncodedRow, Encoder, Overlong
from ds_longft.data.formats import to_row
from ds_longft.data.ledger import Entry, Tally
from ds_longft.data.pairs import EncodedPair, PairSet, encode_pairs, pairs_to_batch
from ds_longft.data.preferences import PREFERENCE, PreferenceRow, to_preference
from ds_longft.data.rows import BadRow, Row
from ds_longft.data.tokenized import TokenizedSet, to_record_batch

INLINE_BYTES = 4 << 20  # below this, starting processes takes longer than the work
BLOCKS_UNDER_WAY = 3  # for each worker


@dataclass(frozen=True)
class RowKind:
    """The way of a record to the tokens on disk."""

    tokenized: type[TokenizedSet]
    to_row: Callable[..., Any]  # of a record, its format, source and origin
    encode: Callable[[Encoder, list[Any]], Sequence[Any]]
    to_batch: Callable[[list[Any]], pa.RecordBatch]

    @classmethod
    def of(cls, name: str) -> RowKind:
        """The kind of rows in the format of that name."""
        return PAIRS if name == PREFERENCE else SINGLE


SINGLE = RowKind(TokenizedSet, to_row, Encoder.encode, to_record_batch)
PAIRS = RowKind(PairSet, lambda record, _, **place: to_preference(record, **place), encode_pairs, pairs_to_batch)


@dataclass(frozen=True)
class Task:
    """One block and how to read it."""

    block: Block
    format: str
    source: str


@dataclass(frozen=True)
class Result:
    """What became of one block."""

    batch: pa.RecordBatch
    left_out: list[Entry]
    tally: Tally  # without these


def encoded_blocks(
    tasks: Iterable[tuple[int, int, Task]], encoder: Encoder, workers: int | None, size_bytes: int
) -> Iterator[tuple[int, int, Result]]:
    """(part, position, result) of each task in order; in this process when there is little to do."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1 or 0 < size_bytes < INLINE_BYTES:
        yield from ((part, position, encode_block(task, encoder)) for part, position, task in tasks)
        return
    # forkserver: a fork of this process could inherit threads and a GPU context.
    with ProcessPoolExecutor(workers, get_context("forkserver"), _start_worker, (encoder,)) as pool:
        under_way: deque[tuple[int, int, Future[Result]]] = deque()
        try:
            for part, position, task in tasks:
                under_way.append((part, position, pool.submit(_run_in_worker, task)))
                if len(under_way) >= workers * BLOCKS_UNDER_WAY:
                    yield _next(under_way)
            while under_way:
                yield _next(under_way)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _next(under_way: deque[tuple[int, int, Future[Result]]]) -> tuple[int, int, Result]:
    part, position_bytes, future = under_way.popleft()
    return part, position_bytes, future.result()


_worker_encoder: Encoder  # exists in worker processes only: sent once, not with every block


def _start_worker(encoder: Encoder) -> None:
    # One core each, as a pool of one thread: without a pool the tokenizers library takes a quarter more CPU time
    # for the same texts (benchmarks/tokenise.py).
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS="1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent ends its workers
    # A killed parent leaves workers waiting for ever, with the caller's stdout open.
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    global _worker_encoder  # noqa: PLW0603  the way a process pool hands its workers what they all need
    _worker_encoder = encoder


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _run_in_worker(task: Task) -> Result:
    return encode_block(task, _worker_encoder)


def encode_block(task: Task, encoder: Encoder) -> Result:
    """Parse, lay out and encode one block. Raises `Overlong` for the first row too long with `overlong: error`."""
    kind_of_row = RowKind.of(task.format)
    rows: list[Row | PreferenceRow] = []
    left_out: list[Entry] = []
    tally = Tally()
    for origin, record in parse_block(task.block):
        tally.read += 1
        try:
            if isinstance(record, BadRow):
                raise record
            rows.append(kind_of_row.to_row(record, task.format, source=task.source, origin=origin))
        except BadRow as bad:
            left_out.append(Entry.of(origin, bad))
    encoded: list[EncodedRow | EncodedPair] = []
    unused: Counter[str] = Counter()
    for row, result in zip(rows, kind_of_row.encode(encoder, rows), strict=True):
        if not isinstance(result, BadRow):
            encoded.append(result)
            unused.update(result.row.unused)
            continue
        if isinstance(result, Overlong):
            if encoder.overlong == "error":
                raise Overlong(f"{row.origin}: {result.reason}", result.detail)
            tally.too_long.append((result.tokens, result.targets))
        left_out.append(Entry.of(row.origin, result))
    tally.usable, tally.truncated = len(encoded), sum(row.truncated for row in encoded)
    tally.unused = dict(unused)
    return Result(kind_of_row.to_batch(encoded), left_out, tally)
