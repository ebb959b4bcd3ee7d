"""How full a rank's GPU is, and how much of it a run may plan with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ds_longft.decide.memory import SPARE_SHARE
from ds_longft.decide.setting import GIB, Gpu


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU, as torch's allocator and the driver see it; all sizes in bytes."""

    device: torch.device

    def reset_peak(self) -> None:
        """Forget the highest peak so far."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> int:
        """Allocated at this moment."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """The most that was allocated at once since the last reset."""
        return torch.cuda.max_memory_allocated(self.device)

    def free(self) -> int:
        """What that peak left unused, less a reserve; never negative."""
        total, outside = total_and_outside_torch(self.device)
        return max(0, int(total * (1 - SPARE_SHARE)) - outside - self.peak())

    def release(self) -> None:
        """Hand cached blocks back."""
        torch.cuda.empty_cache()


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The device's memory; None on a CPU, where nothing is rehearsed."""
    return DeviceMemory(device) if device.type == "cuda" else None


def total_and_outside_torch(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU, and those in use that torch knows nothing of: the context, NCCL, other processes.

    Where torch was given a share of the GPU (`set_per_process_memory_fraction`), it ends with that share.
    """
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return min(total, outside + int(torch.cuda.get_per_process_memory_fraction(device) * total)), outside


def own_memory_gib(device: torch.device) -> tuple[float | None, float]:
    """What this run may plan with on each GPU, and what other processes hold of one. Collective; (None, 0) on CPUs.

    The smallest of all ranks' GPUs: what is chosen by it must be the same everywhere. What is in use and not by torch
    is the run's own up to what the planner counts for context and NCCL.
    """
    if device.type != "cuda":
        return None, 0.0
    total, outside = total_and_outside_torch(device)
    typical = Gpu.load("h200")  # contexts of other types differ little
    taken = max(0.0, outside - (typical.context_gib + typical.nccl_gib) * GIB)
    least = torch.tensor([total - taken, -taken], dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    own, others = (float(x) / GIB for x in least)
    return own, -others
