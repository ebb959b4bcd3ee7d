"""When to stop: a signal, the end of the time a run was given, or a launcher that is gone. A rank only notes it; all
ranks agree, save and leave.

Nothing is saved inside a signal handler: the flag is looked at between packs, where every rank is at the same place. A
thread reads the signals: they are noted, and a second Ctrl-C is obeyed, also while a rank waits in a collective.

Until all ranks have joined nobody can agree on anything, and a peer that is dead already would be waited for: a signal
ends the process.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ds_longft.errors import EXIT_REQUEUE

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVE_MARGIN = 1.5  # times the longest save so far: file systems are slowest when everybody is told to leave
UNMEASURED_SAVE_S = 60.0
SAME_PRESS_S = 2.0  # the terminal and the launcher both hand on one Ctrl-C
LOOK_AT_LAUNCHER_S = 1.0
EXIT_BY_SIGNAL = 128  # and the signal's number, as shells say it
EXIT_INTERRUPTED = EXIT_BY_SIGNAL + signal.SIGINT


class StopRequest:
    """This rank's wish to stop. `reason` is None as long as there is none."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` counts seconds, whatever is done to the machine's clock; SLURM speaks of `wall_clock`."""
        self.reason: str | None = None
        self.joined = False
        """All ranks have joined, so that they can agree on a stop."""
        self.training_begun = False
        """Training has begun, so that a stop has something to save."""
        self.at_once: Callable[[str, int], None] = lambda why, code: None
        """Ends the process now; called with the reason and the exit code, in a thread."""
        self.heard: Callable[[str], None] = lambda reason: None
        """Called with the first reason to stop that came as a signal while there is training, in a thread."""
        self.clock, self.wall_clock = clock, wall_clock
        self.started = clock()
        self._deadline: float | None = None  # on the clock
        self._job_end: float | None = None  # on the wall clock
        self._budget_s = 0.0  # what was left when the budget was set
        self._pressed: float | None = None
        self._save_s: float | None = None
        self._round_s = 0.0  # longest time between two looks
        self._looked: float | None = None

    @contextmanager
    def listening(self, *, launched: bool = False) -> Iterator[None]:
        """Heed USR1, USR2, TERM, INT and HUP; with `launched` also the end of the process that started this one."""
        ends, wakes = os.pipe()
        os.set_blocking(wakes, False)
        watched = launchers() if launched else []
        before = {number: signal.signal(number, lambda *_: None) for number in heeded()}
        woken = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        over = threading.Event()
        thread = threading.Thread(
            target=self._listen, args=(ends, watched, over), name="ds_longft-signals", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for number, handler in before.items():
                signal.signal(number, handler)
            over.set()
            os.write(wakes, b"\0")
            thread.join()
            os.close(ends)
            os.close(wakes)

    def _listen(self, ends: int, watched: list[tuple[int, int]], over: threading.Event) -> None:
        while not over.is_set():
            ready, _, _ = select.select([ends], [], [], LOOK_AT_LAUNCHER_S)
            for number in os.read(ends, 64) if ready else b"":
                if number in SIGNALS:
                    self.note(signal.Signals(number))
            if any(parent_of(child) not in (parent, None) for child, parent in watched):
                watched = []
                self.note_that_the_launcher_is_gone()

    def note(self, number: signal.Signals) -> None:
        """A signal came. A second Ctrl-C, one before there is anything to save, and any before all ranks have joined
        end the process now.
        """
        if number == signal.SIGINT:
            now = self.clock()
            if not self.training_begun:
                self.at_once("interrupted before training began", EXIT_INTERRUPTED)
            elif self._pressed is None:
                self._pressed = now
            elif now - self._pressed > SAME_PRESS_S:
                self.at_once("interrupted twice: nothing was saved since the last checkpoint", EXIT_INTERRUPTED)
        elif not self.joined:
            # Launchers send TERM behind a peer's crash, which 75 would requeue for ever. They never send USR1 or USR2.
            code = EXIT_REQUEUE if number in (signal.SIGUSR1, signal.SIGUSR2) else EXIT_BY_SIGNAL + number
            self.at_once(f"signal {number.name} before the ranks had joined: nothing was trained", code)
        if self.reason is None:
            self.reason = f"signal {number.name}"
            if self.training_begun:
                self.heard(self.reason)

    def note_that_the_launcher_is_gone(self) -> None:
        """In training a reason to stop, as a signal is. Before, nothing is to be saved, and nobody else ends us."""
        if not self.training_begun:
            self.at_once("the launcher is gone, before training began", EXIT_BY_SIGNAL + signal.SIGHUP)
        self.reason = self.reason or "the launcher is gone"

    def set_budget(self, max_minutes: float | None, env: Mapping[str, str] = os.environ) -> None:
        """Stop in time for `max_minutes` after the start of the process and for the end of the SLURM job, if any."""
        job_end = env.get("SLURM_JOB_END_TIME", "")
        self._deadline = None if max_minutes is None else self.started + 60 * max_minutes
        self._job_end = float(job_end) if job_end.isdigit() else None
        self._budget_s = self.left_s() or 0.0

    def left_s(self) -> float | None:
        """Seconds until the earlier of the two ends; None where there is neither."""
        left = [] if self._deadline is None else [self._deadline - self.clock()]
        left += [] if self._job_end is None else [self._job_end - self.wall_clock()]
        return min(left, default=None)

    def saved(self, seconds: float) -> None:
        """Note how long a save took; the longest counts."""
        self._save_s = max(seconds, self._save_s or 0.0)
        self._looked = None  # the save lies between two looks, and is no part of a round

    @property
    def margin_s(self) -> float:
        """How long before the end to stop: for the save and for the work until the next look."""
        save_s = min(UNMEASURED_SAVE_S, 0.1 * self._budget_s) if self._save_s is None else self._save_s
        return SAVE_MARGIN * save_s + self._round_s

    def asked(self) -> bool:
        """Whether this rank wants to stop. Called once between two packs."""
        now = self.clock()
        if self._looked is not None:
            self._round_s = max(self._round_s, now - self._looked)
        self._looked = now
        left_s = self.left_s()
        if self.reason is None and left_s is not None and left_s <= self.margin_s:
            self.reason = f"the time is up in {left_s:.0f} s"
        return self.reason is not None


def heeded() -> list[signal.Signals]:
    """Signals to heed: all but those this process was started to ignore, as nohup does with HUP."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def launchers() -> list[tuple[int, int]]:
    """(process, its parent) for each process between this one and the command that the user started.

    deepspeed on one machine is two: `deepspeed` itself, which may be told to end without its ranks hearing of it, and
    `deepspeed.launcher.launch`, whose children they are.
    """
    here = os.getpid()
    parent = parent_of(here) or 0
    if parent <= 1:  # of nobody, or of a container's first process, without which nothing is
        return []
    chain = [(here, parent)]
    if "deepspeed.launcher.launch" in _command_of(parent):
        above = parent_of(parent)
        # Otherwise it was started by somebody else, perhaps by a container's first process: that proves nothing.
        if above and "deepspeed" in _command_of(above):
            chain.append((parent, above))
    return chain


def parent_of(pid: int) -> int | None:
    """The parent of a process, 0 where it is no more, None where that cannot be told now (too many open files)."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except (OSError, ValueError, IndexError):
        return None


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
