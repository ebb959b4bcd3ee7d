"""Starts one process a rank on this machine and waits for them: for commands that need no launcher of the user's."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from ds_longft.train.ranks import free_port


def launch_ranks(module: str, argv: list[str], *, ranks: int, gpus: int) -> int:
    """Run `python -m MODULE` on `ranks` processes; returns the first code that is not 0.

    When one ends with an error, the others, which would wait for it, are ended too.
    """
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", module, *argv]
    processes = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    try:
        while True:
            codes = [process.poll() for process in processes]
            failed = next((code for code in codes if code), None)
            if failed is not None or None not in codes:
                return failed or 0
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()
