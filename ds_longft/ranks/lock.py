"""One run at a time in an output folder.

The lock is the kernel's (flock): it ends with the process that holds it, however that ends, so none is ever left
behind.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout

from ds_longft.errors import ConfigError
from ds_longft.run_files import LockHolder
from ds_longft.stored import read_if_good

LOCK = ".lock"
HOLDER = ".lock-holder.json"
PATIENCE_S = 15.0  # a run that was just killed may need a moment to be gone


def lock_folder(folder: Path, patience_s: float = PATIENCE_S) -> FileLock:
    """Take the folder until this process ends (or `.release()`).

    Raises:
        ConfigError: another run holds it; names its host, process and job.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=patience_s, poll_interval=0.2)
    except Timeout:
        raise ConfigError(
            f"output_dir {folder} is in use by {_holder(folder)}: end it, or give another folder"
        ) from None
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    (folder / HOLDER).write_text(json.dumps(holder) + "\n")
    return lock


def _holder(folder: Path) -> str:
    holder = read_if_good(folder / HOLDER, LockHolder)
    if holder is None:
        return "another run"
    job = f", SLURM job {holder.job}" if holder.job else ""
    return f"process {holder.pid} on {holder.host}{job}, since {holder.since}"
