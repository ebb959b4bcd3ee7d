"""`deepspeed launch/train.py` and `python -m ds_longft.train`: parse -> check -> build -> train -> exit code.

Runs under deepspeed, torchrun, srun and plain python. Nothing heavy is imported before the checks have passed, so that a
mistake in the config costs a second and not a model load.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from ds_longft.errors import LongftError
from ds_longft.train.ranks import Launch


def main(argv: list[str] | None = None) -> int:
    """Train as `argv` says; returns the exit code (see `ds_longft.errors`)."""
    launch = Launch.from_environment()
    status = Status(launch)
    try:
        code = train(list(sys.argv[1:] if argv is None else argv), launch, status)
    except LongftError as e:
        code = status.failed(e, e.exit_code)
    except BaseException as e:  # crashed: say where, and do not wait for peers
        if isinstance(e, SystemExit):  # --help
            raise
        traceback.print_exc()
        code = status.failed(e, 1)
    status.write(code)
    if code and launch.world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an ordinary exit can wait forever on the peers of an open process group
    return code


class Status:
    """The exit code, also in `run_status.json`: torchrun turns every failure into 1."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.folder: Path | None = None
        self.error: str | None = None

    def failed(self, error: BaseException, code: int) -> int:
        """Note the error and show it once per node."""
        self.error = f"{type(error).__name__}: {error}"
        if isinstance(error, LongftError) and self.launch.local_rank == 0:
            print(f"\n{error}\n", file=sys.stderr, flush=True)
        return code

    def write(self, code: int) -> None:
        """Leave the code and the error beside the run's records, where there is a run."""
        if self.launch.rank == 0 and self.folder is not None and self.folder.is_dir():
            (self.folder / "run_status.json").write_text(json.dumps({"exit_code": code, "error": self.error}) + "\n")


def train(argv: list[str], launch: Launch, status: Status) -> int:
    """The whole run; raises LongftError for everything the user can mend."""
    from ds_longft.check import preflight
    from ds_longft.settings import load_config

    started = time.monotonic()
    if not any(a.startswith(("--config", "--model", "--help", "-h")) for a in argv):
        from ds_longft.quickstart import prepare  # the bare command: a small real model on a small real job

        argv = ["--config", str(prepare()), *argv]
    config = load_config(argv)

    has_gpu = _gpus() > 0
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.local_world)))
    settings, sp = preflight(
        config, world=launch.world, local_world=launch.local_world, device="cuda" if has_gpu else "cpu"
    )
    from ds_longft.train.run import run

    return run(config, settings, sp, launch, status, started)


def _gpus() -> int:
    """CUDA devices this process sees, without importing torch on machines that have none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or visible == "" or not Path("/dev/nvidiactl").exists():
        return 0
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    raise SystemExit(main())
