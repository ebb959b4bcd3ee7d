"""`run_status.json`: how the run stands, for those who start it again. torchrun turns every failure into exit code
1.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_longft.errors import EXIT_CONFIG, EXIT_REQUEUE, LongftError, RankError
from ds_longft.ranks.join import Launch
from ds_longft.run_files import StatusFile
from ds_longft.stored import read_if_good
from ds_longft.train.durable import PATIENCE_S, insist
from ds_longft.train.secrets import redact

if TYPE_CHECKING:  # the planner brings torch
    from ds_longft.decide.decisions import Run

STATUS = "run_status.json"


def this_start() -> str | None:
    """Names one start of a SLURM job: its id, how often it was requeued, and when, since ids are used again."""
    if "LONGFT_START" in os.environ:
        return os.environ["LONGFT_START"]
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else None


def crashed_before(folder: Path) -> bool:
    """Whether the run before this one in the folder came to no orderly end: something may be half written."""
    before = read_if_good(folder / STATUS, StatusFile)
    return before is not None and before.exit_code not in (0, EXIT_REQUEUE, EXIT_CONFIG)


class Status:
    """Written when training begins and when the process ends. Rank 0 writes, or another one where rank 0 hangs."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.folder: Path | None = None  # once it is this run's
        self.output: Path | None = None  # as soon as it is known; another run may be in it
        self.error: str | None = None
        self.first_step: int | None = None
        self.start_up_s: dict[str, float] | None = None
        self.where = "at the start"  # what the run is at, for messages
        self.run: Run | None = None  # what is known of it, for messages
        self.begun = time.time()

    def training(self, first_step: int, start_up_s: dict[str, float]) -> None:
        """Training begins after `first_step` steps of earlier runs; `start_up_s`: of each phase of the start."""
        self.first_step, self.start_up_s = first_step, start_up_s
        self.write(None)

    def failed(self, error: BaseException | str, code: int) -> int:
        """Note the error and show it once per node; returns `code`."""
        self.error = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        if isinstance(error, LongftError) and (self.launch.local_rank == 0 or isinstance(error, RankError)):
            print(f"\n{redact(str(error))}\n", file=sys.stderr, flush=True)
        return code

    def write(self, exit_code: int | None, *, force: bool = False) -> None:
        """Leave the code (None: running) and the error beside the run's records, where there is a run."""
        if self.launch.rank and not force:
            return
        if self.folder is None:
            self._write_if_free(exit_code)
        elif self.folder.is_dir():
            self._write(self.folder, exit_code)

    def _write_if_free(self, exit_code: int | None) -> None:
        """A start that failed early says so too, unless another run has the folder: there the status is that one's."""
        if self.output is None or not self.output.is_dir():
            return
        try:
            from ds_longft.ranks.lock import lock_folder  # not for the help

            lock = lock_folder(self.output, patience_s=0.0)
        except (LongftError, OSError):
            return
        self._write(self.output, exit_code)
        lock.release()

    def _write(self, folder: Path, exit_code: int | None) -> None:
        if exit_code == 1 and self._peer_said_why():
            return  # this rank only lost its peer
        content: dict[str, Any] = {
            "exit_code": exit_code,
            "error": self.error and redact(self.error),
            "first_step": self.first_step,
            "start_up_s": self.start_up_s,
            "start": this_start(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "rank": self.launch.rank,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        tmp = folder / f".{STATUS}.{self.launch.rank}"

        def work() -> None:
            tmp.write_text(json.dumps(content) + "\n")
            os.replace(tmp, folder / STATUS)

        # While training goes on the code is null, which a reader takes for crashed or running: it is not worth a wait.
        patience_s = 0.0 if exit_code is None else PATIENCE_S
        insist(work, STATUS, lambda text: print(text, file=sys.stderr, flush=True), patience_s=patience_s)

    def _peer_said_why(self) -> bool:
        """Whether another rank of this run has left its reason."""
        with suppress(OSError):
            if self.folder is not None and (self.folder / STATUS).stat().st_mtime >= self.begun:
                content = read_if_good(self.folder / STATUS, StatusFile)
                return content is not None and content.exit_code is not None and content.rank != self.launch.rank
        return False
