"""Is the run still well? A watchdog for ranks that wait forever, and the record of a loss that is not finite."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ds_longft.batch import Step
from ds_longft.errors import EXIT_HANG
from ds_longft.layout import ParallelLayout

GIL_GRACE_S = 30.0


class Watchdog:
    """Ends a process whose main thread stays in one section for longer than `limit_s`, and says where every rank was.

    A thread of ours does it (exit 71). Should it get no turn, because some C code holds the interpreter's lock,
    Python's own C-level timer dumps the stacks half a minute later (exit 1).
    """

    def __init__(
        self, folder: Path, rank: int, world: int, limit_s: float, on_hang: Callable[[str, bool], None]
    ) -> None:
        """`on_hang(message, lowest)` is called just before the end; `lowest`: no living rank has a lower number."""
        self.folder, self.rank, self.world, self.limit_s, self.on_hang = folder, rank, world, limit_s, on_hang
        self._count = 0
        self._section: tuple[str, float] | None = None
        self._over = threading.Event()
        self._ending = threading.Event()
        self._path(rank).unlink(missing_ok=True)  # of an earlier run
        self._thread = threading.Thread(target=self._watch, name="ds_longft-watchdog", daemon=True)
        self._thread.start()

    def enter(self, section: str) -> None:
        """The main thread begins `section`; the previous one is over. Every rank passes the same sections in the same
        order.
        """
        self._count += 1
        self._section = (section, time.monotonic())
        faulthandler.dump_traceback_later(self.limit_s + GIL_GRACE_S, exit=True)

    def stop(self) -> None:
        """Nothing is watched any more."""
        self._section = None
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def last_word(self) -> None:
        """Called when the main thread fails. If this watchdog is already ending the process, wait for it (exit 71): the
        error is only the lost connection to a peer that left a moment earlier for the same reason.
        """
        if self._ending.is_set():
            self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit_s / 10)):
            section = self._section
            if section is not None and time.monotonic() - section[1] > self.limit_s:
                self._end(section[0])

    def _end(self, section: str) -> None:
        self._ending.set()
        here: dict[str, Any] = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        here |= {"count": self._count, "section": section}
        with suppress(OSError), open(self._path(self.rank), "w") as f:  # a full disk must not keep us from ending
            f.write(json.dumps(here) + "\n")
            f.flush()
            faulthandler.dump_traceback(f)
        faulthandler.dump_traceback(sys.stderr)
        time.sleep(min(5.0, self.limit_s))  # for the other ranks' files
        seen = {r: report for r in range(self.world) if (report := self._report(r)) is not None} | {self.rank: here}
        message = hang_message(seen, self.world, self.limit_s)
        print(f"\n{message}\nStacks: {self.folder}/hang-rank-*.txt\n", file=sys.stderr, flush=True)
        self.on_hang(message, self.rank == min(seen))
        os._exit(EXIT_HANG)

    def _path(self, rank: int) -> Path:
        return self.folder / f"hang-rank-{rank:05d}.txt"

    def _report(self, rank: int) -> dict[str, Any] | None:
        try:
            with open(self._path(rank)) as f:
                report: dict[str, Any] = json.loads(f.readline())
                return report
        except (OSError, ValueError):
            return None


def hang_message(seen: dict[int, dict[str, Any]], world: int, limit_s: float) -> str:
    """Which ranks hold up the others, from the reports of those that could still give one."""
    silent = [r for r in range(world) if r not in seen]
    furthest = max(report["count"] for report in seen.values())
    behind = [r for r, report in seen.items() if report["count"] < furthest]
    where = "; ".join(sorted({f"rank {r} in {seen[r]['section']}" for r in (behind or seen)})[:8])
    text = f"no progress for {limit_s:.0f} s ({where})"
    if silent:
        text += f"; no answer from rank {', '.join(map(str, silent))}: stopped, dead, or its node is"
    elif behind:
        text += f"; rank {', '.join(map(str, behind))} lags behind the others"
    return text


def describe_packs(
    step: Step, layout: ParallelLayout, loss_sums: list[float], origin: Callable[[int], str]
) -> dict[str, Any]:
    """What this rank trained on in a step, and which of its loss sums are not finite (JSON has no NaN)."""
    packs = [
        {"rows": list(pack.rows), "origins": [origin(row) for row in pack.rows], "loss_is_finite": math.isfinite(loss)}
        for pack, loss in zip(step.packs, loss_sums, strict=True)
    ]
    return {"rank": layout.rank, "dp_rank": layout.dp_rank, "sp_rank": layout.sp_rank, "packs": packs}


def write_nonfinite(folder: Path, step_number: int, what: str, ranks: list[dict[str, Any]]) -> Path:
    """nonfinite-step-<n>.json: the rows every rank had in the step that was not applied."""
    path = folder / f"nonfinite-step-{step_number}.json"
    path.write_text(
        json.dumps({"step": step_number, "what": what, "ranks": ranks}, indent=1, ensure_ascii=False) + "\n"
    )
    return path
