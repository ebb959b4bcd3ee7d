"""Who am I among the processes, and the few things ranks agree on outside the model's own communication."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ds_longft.errors import LongftError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """What the launcher (deepspeed, torchrun, srun, or nobody) says about this process."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Read RANK & co. of deepspeed and torchrun, else SLURM_PROCID & co., else one process alone.

        Fills in what torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) where missing.
        """
        env = os.environ
        if "RANK" in env:
            local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
            launch = cls(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), int(local))
        elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:  # inside srun, not the batch script itself
            world = int(env["SLURM_NTASKS"])
            local_world = world // int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
            launch = cls(int(env["SLURM_PROCID"]), world, int(env["SLURM_LOCALID"]), max(1, local_world))
        else:
            launch = cls(0, 1, 0, 1)
        env.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world), LOCAL_RANK=str(launch.local_rank))
        env["LOCAL_WORLD_SIZE"] = str(launch.local_world)
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in env:
            # Alone: any free port. Under srun every task needs the same one: derived from the job.
            env["MASTER_PORT"] = str(
                20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000 if launch.world > 1 else _free_port()
            )
        return launch


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def join(launch: Launch) -> tuple[torch.device, Agreement]:
    """Join the other processes (NCCL on GPUs, gloo on CPUs); returns this rank's device and the host-side group."""
    import deepspeed
    import torch
    from deepspeed.utils import logger

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed")
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logger.setLevel(logging.WARNING)
    if not cuda:
        # DeepSpeed would compile a shared-memory all-reduce for CPU ranks at start: three minutes, and a killed build
        # leaves a lock that stops every later run.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return device, Agreement()


class Agreement:
    """Small host-side exchanges over a gloo group of their own, with a timeout long enough for tokenising a data set."""

    def __init__(self, timeout_h: float = 24.0) -> None:
        import torch.distributed as dist

        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=timeout_h))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's (small, picklable) value, in rank order, on every rank."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def rank0_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0, then on the others: what rank 0 wrote to disk is there for them.

        An error of any rank is raised on every rank, so that nobody waits for a peer that has given up.
        """
        result: list[T] = []
        for turn in (True, False):
            error = None
            if (self.rank == 0) == turn:
                try:
                    result.append(work())
                except (LongftError, OSError) as e:
                    error = e
            first = next((e for e in self.gather(error) if e is not None), None)
            if first is not None:
                raise first
        return result[0]

    def same(self, what: str, value: str) -> None:
        """Raise unless `value` (a hash, a version) is the same on every rank.

        Raises:
            LongftError: names the ranks that differ.
        """
        values = self.gather(value)
        odd = [r for r, v in enumerate(values) if v != values[0]]
        if odd:
            raise LongftError(
                f"{what} differs between ranks: rank 0 has {values[0]}, rank {odd[0]} has {values[odd[0]]}"
            )
