"""Ranks of this machine without a launcher of the user's: of commands that need some, and of `launch/local.sh`."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from ds_longft.errors import EXIT_CONFIG, EXIT_HANG, EXIT_NON_FINITE, EXIT_PORT, EXIT_REQUEUE, LongftError
from ds_longft.ranks.interrupt import EXIT_BY_SIGNAL, heeded
from ds_longft.ranks.join import Launch, free_port, visible_gpus

PR_SET_PDEATHSIG = 1  # prctl(2)
GRACE_S = 30.0  # for a save, after TERM


def launch_ranks(module: str, argv: list[str], *, ranks: int, gpus: int, hand_on: bool = False) -> int:
    """Run `python -m MODULE` on `ranks` processes; returns the code that says most of why they ended.

    When one ends with an error, the others, which would wait for it, are ended too; all of them when this process is
    killed: they would go on holding GPUs and writing results that the next start writes as well. `hand_on`: signals
    to this process are the ranks' to obey, and this one waits for what they do.
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

    many = f"{ranks} processes; each imports" if ranks > 1 else "a process; it imports"
    print(f"starting {many} torch ...", file=sys.stderr, flush=True)
    processes: list[subprocess.Popen[bytes]] = []

    def tell_ranks(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)  # nothing, where it has ended

    if hand_on:
        for number in heeded():
            signal.signal(number, tell_ranks)
    for rank in range(ranks):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=own, preexec_fn=end_with_parent))  # noqa: PLW1509 - takes no lock
    try:
        while not any(process.poll() for process in processes) and any(process.poll() is None for process in processes):
            time.sleep(0.1)
    finally:
        _end(processes)
    return telling_code([process.returncode for process in processes])


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what is left; those that heed TERM only between two packs, and wait for a peer that is gone, by force."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def telling_code(codes: Sequence[int]) -> int:
    """The exit code that says most of why ranks ended: one of ours, then a signal (128 + number), then any other."""
    ours = [code for code in codes if code in (EXIT_CONFIG, EXIT_PORT, EXIT_NON_FINITE, EXIT_HANG, EXIT_REQUEUE)]
    by_term = EXIT_BY_SIGNAL + signal.SIGTERM  # a rank that was ended because another had failed says nothing
    signals = [EXIT_BY_SIGNAL - code for code in sorted(codes) if code < 0]
    others = [*signals, *(code for code in codes if code > 0)]
    return next(iter([*ours, *(code for code in others if code != by_term), *others]), 0)


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


def main(argv: list[str]) -> int:
    """`python -m ds_longft.ranks.launch [--ranks N] KEYS`: train on this machine; returns the run's own exit code."""
    gpus, ranks = visible_gpus(), "all"
    if argv[:1] == ["--ranks"]:
        ranks, argv = argv[1] if len(argv) > 1 else "", argv[2:]
    if ranks != "all" and not (ranks.isdecimal() and int(ranks)):
        print(f"--ranks is {ranks!r}: give a number from 1, or all (one for each GPU)", file=sys.stderr)
        return EXIT_CONFIG
    count = max(1, gpus) if ranks == "all" else int(ranks)
    return launch_ranks("ds_longft.train", argv, ranks=count, gpus=gpus, hand_on=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
