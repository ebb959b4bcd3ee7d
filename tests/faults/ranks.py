"""Runs of real processes that cost a second: ranks are forked from a server that has torch and deepspeed imported.

Each rank is a process of its own with its own environment, signals and exit code, and runs the program's `main`.
Faults are put in by `faults.py` in the rank's process before it starts: the product has no hooks for them.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing as mp
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed.pool import free_port

CRASH = -signal.SIGKILL
CLONE_NEWNET = 0x40000000


def _rank_main(argv: list[str], env: dict[str, str], out: str, fault: dict[str, Any] | None) -> None:
    os.setpgid(0, 0)
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    for name in [n for n in os.environ if n.startswith("SLURM_")]:
        del os.environ[name]
    os.environ.update(env)
    if "umask" in (fault or {}):
        os.umask(0o077)
    if fault and "netns" in fault:
        with open(f"/run/netns/{fault['netns']}") as namespace:
            if ctypes.CDLL("libc.so.6", use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
    if fault:
        from tests.faults import faults

        faults.put_in(fault)
    from ds_longft.train.__main__ import main

    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Run:
    """The ranks of one start."""

    processes: list[Any]
    outs: list[Path]
    started: float = field(default_factory=time.monotonic)

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank or to all."""
        for r, process in enumerate(self.processes):
            if rank in (None, r) and process.is_alive():
                os.kill(process.pid, number)

    def wait(self, timeout_s: float = 60.0) -> list[int | None]:
        """Exit codes in rank order (None: still alive after the timeout, and killed)."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        """End what is left."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def text(self, rank: int | None = None) -> str:
        """What the ranks have written."""
        return "".join(
            p.read_text(errors="replace") for r, p in enumerate(self.outs) if rank in (None, r) and p.exists()
        )

    def wait_for(self, ready: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Until `ready()`, while the ranks live."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < deadline, self.text()
            assert any(p.is_alive() for p in self.processes), self.text()
            time.sleep(0.01)


class Launcher:
    """Starts runs of one job."""

    def __init__(self, config: Path) -> None:
        self.config, self.count = config, 0
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.faults.preload"])
        self.runs: list[Run] = []

    def start(
        self,
        output: Path,
        *keys: str,
        world: int = 2,
        faults: Mapping[int, dict[str, Any]] | None = None,
        env: Mapping[str, str] | None = None,
        rank_env: Callable[[int], dict[str, str]] | None = None,
        rank_keys: Callable[[int], Sequence[str]] | None = None,
    ) -> Run:
        """Start the job with `output_dir` = output and more keys; `faults`: rank -> fault."""
        self.count += 1
        port = free_port()
        processes, outs = [], []
        for rank in range(world):
            settings = {
                "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(env or {}), **(rank_env(rank) if rank_env else
                {}),
            }  # fmt: skip
            out = self.config.parent / f"start-{self.count:03d}-rank-{rank}.log"
            argv = [
                *(() if "--config" in keys else ("--config", str(self.config))),
                "--output_dir",
                str(output),
                *keys,
                *(rank_keys(rank) if rank_keys else ()),
            ]
            process = self.context.Process(target=_rank_main, args=(argv, settings, str(out), (faults or {}).get(rank)))
            process.start()
            processes.append(process)
            outs.append(out)
        run = Run(processes, outs)
        self.runs.append(run)
        return run

    def run(self, output: Path, *keys: str, timeout_s: float = 120.0, **more: Any) -> tuple[list[int | None], Run]:
        """Start and wait: (exit codes, the run). On two cores with a load of 25 the start alone was seen to take 40 s."""
        run = self.start(output, *keys, **more)
        return run.wait(timeout_s), run

    def close(self) -> None:
        """End every rank that is left."""
        for run in self.runs:
            run.kill()


def trace(output: Path) -> list[tuple[Any, ...]]:
    """What must be the same in a resumed run: the step, loss, gradient norm and rate of each, and the evaluations."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        (r["step"], "eval", r["eval_loss"])
        if "eval_loss" in r
        else (r["step"], r["loss"], r["grad_norm"], r["learning_rate"])
        for r in records
    ]


def reached(output: Path) -> int:
    """The last step in the records, 0 before any."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def checkpoints(output: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(p.name.split("-")[1]) for p in output.glob("checkpoint-*"))


def status(output: Path) -> dict[str, Any]:
    return json.loads((output / "run_status.json").read_text())
