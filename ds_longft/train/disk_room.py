"""Is the folder of `train.offload_disk` fast and large enough? Asked before step 1."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import torch

from ds_longft.decide.decisions import Decisions, Run
from ds_longft.decide.setting import GIB
from ds_longft.decide.time import DISK, predict_time
from ds_longft.decide.what_is_kept import bytes_elsewhere
from ds_longft.errors import ConfigError, LongftError
from ds_longft.ranks.join import Agreement
from ds_longft.sequence.disk import CHUNK_BYTES, DiskStore, free_bytes, is_direct, is_memory

T = TypeVar("T")

PROBE_BYTES = 1 << 30
"""Written and read by all ranks of a node together."""

MOST_WAITING = 0.1
"""Of a step. A disk for which steps would wait longer is refused."""

SPARE_ROOM = 1.02
"""Times what is written must be free."""


def measured_gb_s(folder: str, device: torch.device, local_world: int, agreement: Agreement) -> float:
    """GB/s that the slowest node's ranks write, or read, all at once. Collective.

    Raises ConfigError: no folder, one in memory, no files to be made there, or no room.
    """
    share = max(CHUNK_BYTES, PROBE_BYTES // local_world) if device.type == "cuda" else CHUNK_BYTES  # nobody plans there

    def probe() -> float:
        if not Path(folder).is_dir():
            raise ConfigError(f"train.offload_disk: {folder} is no folder: make it, on a local disk (NVMe)")
        if device.type == "cuda" and is_memory(folder):
            raise ConfigError(
                f"train.offload_disk: {folder} is memory (tmpfs), no disk: give a folder on a local disk (NVMe), or "
                "that memory as train.offload_host_gib"
            )
        with closing(DiskStore(folder, device)) as store:
            return min(store.rates(share))

    agreement.gather(None)  # all at once
    return local_world * min(_all_ok(probe, agreement)) / 1e9


def check_disk(run: Run, decisions: Decisions, device: torch.device, agreement: Agreement) -> str | None:
    """See that what goes to the disk fits there and keeps up; a line for the reader. Collective.

    Raises ConfigError: it does not, with what was measured and what is needed.
    """
    folder, keep = run.config.train.offload_disk, decisions.keep or ()
    size = run.local_world * bytes_elsewhere(run.facts, decisions.setting.of_a_pass, keep, ("disk",)) if keep else 0.0
    if folder is None or not size:
        return folder and f"nothing has to go to {folder} (train.offload_disk)"

    def room() -> None:
        free = free_bytes(folder)
        if free < SPARE_ROOM * size:
            raise ConfigError(
                f"train.offload_disk: {folder} has {free / GIB:.1f} GiB free, a step of this node writes "
                f"{size / GIB:.1f} GiB: free room there, give more train.offload_host_gib, or lower "
                "data.max_length_tokens"
            )

    _all_ok(room, agreement)
    if decisions.planned:
        _keeps_up(run, decisions, size)
    return (
        f"{size / GIB:.1f} GiB of a step lie in files without a name in {folder}, which the ranks of a node write and "
        f"read at {run.disk_gb_s:.2f} GB/s"
        + ("" if is_direct(folder) else ", through the page cache: this file system does no direct reads and writes")
    )


def _keeps_up(run: Run, decisions: Decisions, size: float) -> None:
    """`size`: bytes of a node's ranks."""
    setting = decisions.setting
    time = predict_time(run.facts, setting, run.gpu, decisions.keep or ())
    waiting_s = time.parts.get(DISK, 0.0)
    compute_s = time.total_s - waiting_s
    if waiting_s > MOST_WAITING * compute_s:
        passes = 2 if setting.passes == "two" else 1
        needed = passes * size / (compute_s / 3) / 1e9  # out during the forward pass
        raise ConfigError(
            f"train.offload_disk: {run.config.train.offload_disk} writes and reads {run.disk_gb_s:.2f} GB/s, this run "
            f"needs {needed:.2f} GB/s: steps of {compute_s:.1f} s would wait {waiting_s:.1f} s for it. Give a faster "
            "disk, more train.offload_host_gib, or train.recompute: full, which keeps no attention outputs"
        )


def _all_ok(work: Callable[[], T], agreement: Agreement) -> list[T]:
    """What it found on each rank; ConfigError on all where one cannot."""
    found: T | None = None
    problem = None
    try:
        found = work()
    except LongftError as error:
        problem = str(error)
    answers = agreement.gather((found, problem))
    if problems := sorted({problem for _, problem in answers if problem}):
        raise ConfigError(problems)
    return [answer for answer, _ in answers]
