"""What `ds-longft slurm` takes on the command line. In a file without imports: a help waits for none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Job:
    """What a job asks SLURM for, and how it goes on.

    Args:
        nodes: machines.
        gpus_per_node: GPUs, and ranks, on each.
        time: limit of one start, as sbatch takes it. The run goes on in the next one.
        partition: of your cluster; left out: its default.
        account: that is charged; left out: your default.
        signal_s: seconds before the limit at which SLURM asks the ranks to save and stop.
        max_crashes: requeue at most N times after a crash that made progress; after a planned stop always.
        cpus_per_gpu: cores for each rank.
        device: cuda, or cpu for a rehearsal without GPUs.
        sbatch: more options of sbatch, e.g. "--qos=long --mem=0 --mail-type=END".
        before: file with lines of shell that come before the start: module load, export NCCL_..., HF_HUB_OFFLINE=1.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    signal_s: int = 300
    max_crashes: int = 3
    cpus_per_gpu: int = 8
    device: Literal["cuda", "cpu"] = "cuda"
    sbatch: str | None = None
    before: str | None = None


JOB = Job()
