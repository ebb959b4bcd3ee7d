"""Does a job that ended go back into the queue? After a planned stop yes; after a crash only if it got further.

Run by the batch script, with the system's Python alone at heart: nothing of torch is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from ds_longft.errors import EXIT_CONFIG, EXIT_NON_FINITE, EXIT_PORT, EXIT_REQUEUE
from ds_longft.run_files import RequeueHistory, StatusFile
from ds_longft.stored import read_if_good
from ds_longft.train.status import STATUS, this_start

HISTORY = ".requeue.json"


def decide(folder: Path, code: int, max_crashes: int, start: str) -> tuple[bool, str]:
    """(go on?, why). `code` is srun's; `start` names this start of the job, "<id>.<restarts>".

    The count of crashes is kept in the folder and forgotten by a planned stop and by another job.
    """
    status = read_if_good(folder / STATUS, StatusFile) or StatusFile()
    ours = status.start == start
    if ours and status.exit_code is not None and status.exit_code != 1:
        code = status.exit_code  # srun reports the highest code: of a task that was killed, 137
    job = start.split(".", maxsplit=1)[0]
    if code == 0:
        return False, "the run is complete"
    history = read_if_good(folder / HISTORY, RequeueHistory) or RequeueHistory()
    history = history if history.job == job else RequeueHistory()
    newest = newest_step(folder)
    if code in (EXIT_REQUEUE, EXIT_PORT):
        idle = history.idle + 1 if newest <= history.step else 0
        if idle > max_crashes:
            return (
                False,
                f"exit {code}, and {idle} starts in a row added no step to {newest}: is --time too short?",
            )
        _write(folder / HISTORY, {"job": job, "crashes": 0, "step": newest, "idle": idle})
        why = "it stopped as planned" if code == EXIT_REQUEUE else "the port was taken, another one is tried"
        return True, f"{why}; saved is step {newest}"
    if code in (EXIT_CONFIG, EXIT_NON_FINITE):
        return False, f"exit {code}: the same would happen again ({status.error if ours else 'see the log'})"
    first = status.first_step if ours else None
    if first is None or newest <= first:
        return False, f"exit {code}, and no checkpoint was added to step {newest}"
    crashes = 1 + history.crashes
    if crashes > max_crashes:
        return False, f"exit {code}, for the {crashes}th time in this job (at most {max_crashes})"
    _write(folder / HISTORY, {"job": job, "crashes": crashes, "step": newest})
    return True, f"exit {code}, but it got from step {first} to {newest} (crash {crashes} of at most {max_crashes})"


def newest_step(folder: Path) -> int:
    """Step of the newest complete checkpoint, 0 for none."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*"))
    return max((int(m[1]) for m in found if m), default=0)


def _write(path: Path, content: dict[str, Any]) -> None:
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(json.dumps(content) + "\n")
    os.replace(tmp, path)


def main() -> int:
    """Exit 0: requeue; 1: do not. The reason goes to the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--max_crashes", type=int, default=3)
    given = parser.parse_args()
    start = this_start() or ""
    again, why = decide(given.folder, given.code, given.max_crashes, start)
    print(f"{'requeued' if again else 'not requeued'}: {why}", flush=True)
    return 0 if again else 1


if __name__ == "__main__":
    sys.exit(main())
