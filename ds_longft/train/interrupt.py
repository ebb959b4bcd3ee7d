"""When to stop: a signal or the end of the time a run was given. A rank only notes it; all ranks agree, save and leave.

Nothing is saved inside a signal handler: the flag is looked at between packs, where every rank is at the same place.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
SAVE_MARGIN = 1.5  # times the longest save so far: file systems are slowest when everybody is told to leave
UNMEASURED_SAVE_S = 60.0


class StopRequest:
    """This rank's wish to stop. `reason` is None as long as there is none."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.reason: str | None = None
        self.clock = clock
        self.started = clock()
        self.deadline: float | None = None  # on the clock
        self._save_s: float | None = None
        self._round_s = 0.0  # longest time between two looks
        self._looked: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """USR1, USR2 and TERM ask to stop; a second one, also during the save, changes nothing."""

        def note(number: int, frame: FrameType | None) -> None:
            if self.reason is None:
                self.reason = f"signal {signal.Signals(number).name}"

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def set_budget(self, max_minutes: float | None, env: Mapping[str, str] = os.environ) -> None:
        """Stop in time for `max_minutes` after the start of the process and for the end of the SLURM job, if any."""
        ends = []
        if max_minutes is not None:
            ends.append(self.started + 60 * max_minutes)
        if env.get("SLURM_JOB_END_TIME", "").isdigit():
            ends.append(float(env["SLURM_JOB_END_TIME"]))
        self.deadline = min(ends, default=None)

    def saved(self, seconds: float) -> None:
        """Note how long a save took; the longest counts."""
        self._save_s = max(seconds, self._save_s or 0.0)
        self._looked = None  # the save lies between two looks, and is no part of a round

    @property
    def margin_s(self) -> float:
        """How long before the deadline to stop: for the save and for the work until the next look."""
        save_s = self._save_s
        if save_s is None:
            assert self.deadline is not None
            save_s = min(UNMEASURED_SAVE_S, 0.1 * (self.deadline - self.started))
        return SAVE_MARGIN * save_s + self._round_s

    def asked(self) -> bool:
        """Whether this rank wants to stop. Called once between two packs."""
        now = self.clock()
        if self._looked is not None:
            self._round_s = max(self._round_s, now - self._looked)
        self._looked = now
        if self.reason is None and self.deadline is not None and now + self.margin_s >= self.deadline:
            self.reason = f"the time is up in {self.deadline - now:.0f} s"
        return self.reason is not None
