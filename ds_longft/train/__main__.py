"""`deepspeed launch/train.py` and `python -m ds_longft.train`: parse -> check -> build -> train -> exit code.

Runs under deepspeed, torchrun, srun and plain python. Nothing heavy is imported before the checks have passed, so that
a mistake in the config costs a second and not a model load.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from ds_longft.config.preflight import preflight
from ds_longft.config.read import load_run_config
from ds_longft.errors import LongftError, RankError
from ds_longft.ranks.console import outlive_the_console, quiet_libraries, speak_utf8
from ds_longft.ranks.interrupt import StopRequest
from ds_longft.ranks.join import Launch, visible_gpus
from ds_longft.train.secrets import redact
from ds_longft.train.status import Status
from ds_longft.train.trackers import left_behind

STATUS_FIRST_S = 0.5
"""Rank 0 writes the status before the others leave: srun and torchrun end all ranks as soon as one has failed."""


def main(argv: list[str] | None = None) -> int:
    """Train as `argv` says; returns the exit code (see `ds_longft.errors`)."""
    if argv is None:
        speak_utf8()
    outlive_the_console()
    quiet_libraries()
    launched = "RANK" in os.environ or "SLURM_PROCID" in os.environ
    launch = Launch.from_environment()
    status = Status(launch)
    stop = StopRequest()

    def leave(why: str, code: int) -> None:
        status.failed(why, code)
        status.write(code)
        if launch.local_rank == 0:
            print(f"\n{why}", file=sys.stderr, flush=True)
        os._exit(code)

    def heard(reason: str) -> None:
        if launch.rank == 0:
            said = f"\n{reason}: saving after this pack, then it ends. Ctrl-C again ends it now"
            print(said, file=sys.stderr, flush=True)

    stop.at_once, stop.heard = leave, heard
    with stop.listening(launched=launched):
        return _guarded(list(sys.argv[1:] if argv is None else argv), launch, status, stop)


def _guarded(argv: list[str], launch: Launch, status: Status, stop: StopRequest) -> int:
    """Train; whatever happens becomes an exit code."""
    alone = False
    try:
        code = train(argv, launch, status, stop)
    except LongftError as e:
        code = status.failed(e, e.exit_code)
        alone = isinstance(e, RankError)  # other ranks wait for this one: it has to write for them
    except BaseException as e:  # crashed: say where, and do not wait for peers
        if isinstance(e, SystemExit):  # --help
            raise
        print(redact(traceback.format_exc()), file=sys.stderr)
        code = status.failed(e, 1)
    status.write(code, force=alone)
    if code and launch.rank:
        time.sleep(STATUS_FIRST_S)
    if (code and launch.world > 1) or left_behind():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an ordinary exit can wait forever on the peers of an open process group
    return code


def train(argv: list[str], launch: Launch, status: Status, stop: StopRequest) -> int:
    """The whole run; raises LongftError for everything the user can mend."""
    from ds_longft.tools import quickstart

    started = time.monotonic()
    has_gpu = visible_gpus() > 0
    check = partial(preflight, world=launch.world, local_world=launch.local_world, device="cuda" if has_gpu else "cpu")
    words = quickstart.or_quickstart(argv, has_gpu=has_gpu)
    if words != argv and launch.rank == 0:
        print(f"neither model nor data given: training {words[0]}", flush=True)
    config = load_run_config(words, partial(quickstart.without_its_files, check))
    status.output = Path(config.output_dir).expanduser()
    stop.set_budget(config.train.max_minutes)
    quickstart.prepare(config)
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.local_world)))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS starts
    settings, sp = check(config)
    if launch.rank == 0:
        print(f"{time.monotonic() - started:6.1f} s  {config.model.path}: checked; importing torch ...", flush=True)
    from ds_longft.train.run import run

    return run(config, settings, sp, launch, status, stop, started)


if __name__ == "__main__":
    raise SystemExit(main())
