"""Commands that run on ranks and need no launcher of the user's: their flags, their processes, the end of each."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from ds_longft.errors import ConfigError, LongftError
from ds_longft.train.ranks import Launch, free_port

PR_SET_PDEATHSIG = 1  # prctl(2)


class Flags(argparse.ArgumentParser):
    """A command's own flags, the run config's left over; raises ConfigError instead of ending the process."""

    def error(self, message: str) -> NoReturn:  # noqa: D102 - argparse's
        raise ConfigError(f"{self.prog}: {message}")


def launch_ranks(module: str, argv: list[str], *, ranks: int, gpus: int) -> int:
    """Run `python -m MODULE` on `ranks` processes; returns the first code that is not 0.

    When one ends with an error, the others, which would wait for it, are ended too; all of them when this process is
    killed: they would go on holding GPUs and writing results that the next start writes as well.
    """
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", module, *argv]
    prctl = ctypes.CDLL(None).prctl  # found here: between fork and exec nothing should be looked up

    def end_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=end_with_parent,  # noqa: PLW1509 - one system call, which takes no lock
        )
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


def run_rank(main: Callable[[list[str]], int]) -> NoReturn:
    """The whole of `python -m MODULE`: what the user can mend is said once a machine, every rank ends with the code."""
    try:
        code = main(sys.argv[1:])
    except LongftError as error:
        if Launch.from_environment().local_rank == 0:
            print(f"\n{error}\n", file=sys.stderr, flush=True)
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    if code and "RANK" in os.environ:
        os._exit(code)  # an ordinary exit can wait forever on the peers of an open process group
    raise SystemExit(code)
