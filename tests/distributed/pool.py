"""Pools of gloo ranks that live as long as the test session, so that a multi-process case costs about a second.

The ranks are forked from a server that has torch, transformers and deepspeed imported, so that one starts at once.

A case is a module-level function `case(rank, world, *args)`; `pool.run(case, *args)` calls it on every rank and returns
the results in rank order. A failing or hanging case kills its pool; the next case gets a fresh one.
"""

from __future__ import annotations

import functools
import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank_main(rank: int, world: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from ds_longft.layout import ParallelLayout
    from ds_longft.ranks.join import Launch, join

    join(Launch.from_environment())
    # A group's threads wake up all the time: a hundred cases' groups, never closed, cost most of a core.
    ParallelLayout.create = functools.cache(ParallelLayout.create)  # type: ignore[method-assign]
    while True:
        try:
            case, args = pipe.recv()
        except EOFError:  # the pool was stopped
            return
        unset_hf_deepspeed_config()  # of an earlier case: it would partition the models of this one
        try:
            pipe.send((True, case(rank, world, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class WorkerPool:
    """`world` gloo ranks, started on first use."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.workers: list[tuple[Any, Connection]] = []

    def run(self, case: Callable[..., Any], *args: Any, timeout_s: float = 180) -> list[Any]:
        """Results of `case(rank, world, *args)` in rank order; raises AssertionError with the rank's traceback."""
        if not self.workers:
            self._start()
        for _, pipe in self.workers:
            pipe.send((case, args))
        results = []
        for rank, (_, pipe) in enumerate(self.workers):
            ready = pipe.poll(timeout_s)
            try:
                ok, value = pipe.recv() if ready else (False, f"no answer in {timeout_s} s")
            except (EOFError, OSError):
                ok, value = False, "the process died"
            if not ok:
                self._report_and_stop(rank, value)
            results.append(value)
        return results

    def stop(self) -> None:
        """End the ranks."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []

    def _start(self) -> None:
        os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")  # read when the server imports
        context, port = mp.get_context("forkserver"), free_port()
        context.set_forkserver_preload(["tests.faults.preload"])
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def _report_and_stop(self, rank: int, value: str) -> None:
        # The rank seen first may only have lost its peer: show what the others said as well.
        others = []
        for r, (_, pipe) in enumerate(self.workers):
            if r != rank and pipe.poll(1):
                try:
                    ok, text = pipe.recv()
                except (EOFError, OSError):
                    continue
                if not ok:
                    others.append(f"\nrank {r}: {text}")
        self.stop()
        raise AssertionError(f"rank {rank} of {self.world}: {value}" + "".join(others))
