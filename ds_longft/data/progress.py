"""A progress bar on a terminal, and a plain line every few seconds anywhere else."""

from __future__ import annotations

import sys
import time
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 10.0


@cache
def say_once(text: str) -> None:
    """A note to the user on stderr; the same one is said once a process."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `5.7 hours`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:,.1f} hours"


class Progress:
    """How far a job of `total_bytes` is. Writes to stderr; silent with `show=False`."""

    def __init__(self, title: str, total_bytes: int, *, show: bool) -> None:
        self.title = title
        self.total_bytes = total_bytes
        self.show = show
        self._bar: RichProgress | None = None
        self._next_line_s = time.monotonic() + LINE_EVERY_S
        if show and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(title, total=total_bytes or None)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done_bytes: int, text: str) -> None:
        """`done_bytes` of the input are done; `text` says what came of them."""
        if self._bar:
            self._bar.update(self._task, completed=done_bytes, description=f"{self.title} {text}")
        elif self.show and time.monotonic() > self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            share = f" {done_bytes / self.total_bytes:.0%}," if self.total_bytes else ""
            print(f"{self.title}:{share} {text}", file=sys.stderr, flush=True)
