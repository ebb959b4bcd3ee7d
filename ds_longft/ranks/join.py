"""Who am I among the processes, and the few things ranks agree on outside the model's own communication."""

from __future__ import annotations

import datetime
import logging
import os
import random
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ds_longft.errors import LongftError, PortError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

PORTS = range(20_000, 32_000)  # below those that Linux takes for outgoing connections


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
                PORTS[0] + int(env.get("SLURM_JOB_ID", "0")) % len(PORTS) if launch.world > 1 else free_port()
            )
        return launch


def free_port() -> int:
    """A TCP port nobody listens on right now, and which the kernel gives to no connection of its own accord."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise PortError(f"no port from {PORTS[0]} to {PORTS[-1]} is free")


def visible_gpus() -> int:
    """CUDA devices this process sees, without importing torch on machines that have none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu" or visible == "" or not Path("/dev/nvidiactl").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def join(launch: Launch, timeout_s: float = 1800.0) -> tuple[torch.device, Agreement]:
    """Join the other processes (NCCL on GPUs, gloo on CPUs); returns this rank's device and the host-side group.

    A collective that waits longer than `timeout_s` ends the process.
    """
    import deepspeed
    import torch
    from deepspeed.utils import logger
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of loading and writing: hundreds of lines in a log
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|deepspeed|transformers")
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
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise PortError(
            f"port {os.environ.get('MASTER_PORT')} is in use, perhaps by ranks of an earlier run that still train: end "
            f"them, or give the launcher another --master_port"
        ) from error
    return device, Agreement()


class Agreement:
    """Small host-side exchanges over a gloo group of their own, with a timeout long enough for tokenising a data
    set.
    """

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

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; eight bytes, no device involved."""
        import torch
        import torch.distributed as dist

        box = torch.tensor([int(flag)])
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.group)
        return bool(box.item())

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone: its result, or its error, on every rank."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = (work(), None)
            except (LongftError, OSError) as e:
                outcome = (None, e)
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return cast(T, value)

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

    def same(self, facts: dict[str, str]) -> None:
        """Raise unless every fact (a hash, a version, a setting) is the same on every rank.

        Raises:
            LongftError: names each fact that differs and a rank that has it otherwise.
        """
        ranks = self.gather(facts)
        lines = []
        for what, expected in ranks[0].items():
            odd = next((r for r in range(self.world) if ranks[r].get(what) != expected), None)
            if odd is not None:
                lines.append(f"  - {what}: rank 0 has {expected}, rank {odd} has {ranks[odd].get(what)}")
        if lines:
            raise LongftError("ranks differ, so they would not train the same run:\n" + "\n".join(lines))
