"""`ds-longft doctor`: is this machine fit for training, and what to do where it is not. Looks only, changes nothing."""

from __future__ import annotations

import json as jsonlib
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ds_longft import __version__
from ds_longft.train.trackers import wandb_login_problem

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "datasets", "accelerate")
EXTRAS = ("flash-attn", "flash-attn-4", "liger-kernel", "wandb", "tensorboard", "trackio", "mlflow-skinny")
SHM_NEEDED_GIB = 1.0
DISK_NEEDED_GIB = 20.0


@dataclass(frozen=True)
class Diagnosis:
    """One thing looked at."""

    level: str  # ok, note, wrong
    what: str
    seen: str
    mend: str = ""


def doctor(output_dir: str = ".", json: bool = False) -> None:
    """Look at GPUs, driver, NCCL, links, memory, disk, versions, build locks and attention kernels.

    Args:
        output_dir: where runs are to be written: its disk is looked at.
        json: one object a line, for machines.
    """
    findings = examine(Path(output_dir).expanduser())
    if json:
        print("\n".join(jsonlib.dumps(asdict(f)) for f in findings))
        return
    marks = {"ok": "  ok   ", "note": "  note ", "wrong": "  WRONG"}
    for f in findings:
        print(f"{marks[f.level]} {f.what}: {f.seen}" + (f"\n         -> {f.mend}" if f.mend else ""))
    wrong = sum(f.level == "wrong" for f in findings)
    print(f"\n{wrong} to fix" if wrong else "\nnothing to fix")


def examine(output_dir: Path) -> list[Diagnosis]:
    """Everything, in the order a failing start would meet it."""
    return [
        *versions(),
        *gpus(),
        *memory(Path("/proc/meminfo"), Path("/dev/shm")),
        *disk(output_dir),
        *limits(),
        *build_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()),
        *kernels(),
        *tracking(),
    ]


def versions() -> Iterator[Diagnosis]:
    """This package, Python and the system; packages that must be there, and those that may."""
    here = f"{__version__}, Python {platform.python_version()} in {sys.prefix}, {platform.platform()}"
    yield Diagnosis("ok", "ds_longft", here)
    for name in PACKAGES:
        if there := _version_or_none(name):
            yield Diagnosis("ok", name, there)
        else:
            yield Diagnosis("wrong", name, "not installed", f"pip install {name}, or: make setup")
    have = ", ".join(f"{name} {there}" for name in EXTRAS if (there := _version_or_none(name)))
    yield Diagnosis("note", "optional packages", have or "none of " + ", ".join(EXTRAS))


def gpus() -> Iterator[Diagnosis]:
    """Devices, driver against the CUDA of torch, NCCL, links between the GPUs."""
    import torch

    listed = [line for line in _command("nvidia-smi", "-L").splitlines() if line.startswith("GPU")]
    if not listed:
        yield Diagnosis("note", "GPUs", "none: runs use CPU ranks (gloo), for trials and tests")
        return
    yield Diagnosis("ok", "GPUs", f"{len(listed)} x {listed[0].split(': ', 1)[-1].split(' (UUID')[0]}")
    driver = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip()
    if torch.version.cuda is None:
        seen = f"driver {driver}, torch {torch.__version__} without CUDA"
        mend = "this torch is the CPU build: install one for CUDA (pip install torch), then make setup"
        yield Diagnosis("wrong", "torch and CUDA", seen, mend)
        return
    if not torch.cuda.is_available():
        mend = f"torch needs CUDA {torch.version.cuda}: a newer driver, or a torch built for an older CUDA"
        yield Diagnosis("wrong", "torch and CUDA", f"driver {driver} does not serve this torch", mend)
        return
    yield Diagnosis("ok", "torch and CUDA", f"driver {driver}, CUDA {torch.version.cuda}")
    if (seen_gpus := torch.cuda.device_count()) != len(listed):
        limit = os.environ.get("CUDA_VISIBLE_DEVICES")
        yield Diagnosis("note", "visible GPUs", f"{seen_gpus} of {len(listed)} (CUDA_VISIBLE_DEVICES={limit})")
    yield Diagnosis("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    if len(listed) > 1:
        topology = _command("nvidia-smi", "topo", "-m")
        if "NV" in topology.split("Legend")[0].replace("NVIDIA", ""):
            yield Diagnosis("ok", "links", "NVLink")
        else:
            mend = "ranks of one sample exchange activations in every layer: expect that to be slower over PCIe"
            yield Diagnosis("note", "links", "no NVLink between the GPUs", mend)


def memory(meminfo: Path, shm: Path) -> Iterator[Diagnosis]:
    """Host memory, and the shared memory that NCCL and loaders use."""
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, free = (int(fields[k].split()[0]) / 2**20 for k in ("MemTotal", "MemAvailable"))
        yield Diagnosis("ok", "host memory", f"{free:.0f} of {total:.0f} GiB free")
    if shm.exists():
        size = shutil.disk_usage(shm).total / 2**30
        mend = "in a container: --shm-size=16g (docker) or an emptyDir with medium Memory (Kubernetes)"
        level, mend = ("wrong", mend) if size < SHM_NEEDED_GIB else ("ok", "")
        yield Diagnosis(level, "shared memory", f"{size:.1f} GiB in {shm}", mend)


def disk(output_dir: Path) -> Iterator[Diagnosis]:
    """Room where runs are written and where models and data are kept."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path("~/.cache/ds_longft").expanduser()
    for what, path in (("disk of the runs", output_dir), ("disk of models", hub), ("disk of tokenized data", cache)):
        nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(nearest).free / 2**30
        if not nearest.is_dir():
            yield Diagnosis("wrong", what, f"cannot be written: {nearest} is a file", "give another folder")
        elif not os.access(nearest, os.W_OK):
            yield Diagnosis("wrong", what, f"no right to write in {nearest}", "give another folder, or the right")
        elif free < DISK_NEEDED_GIB:
            mend = "a full checkpoint takes 14 bytes a weight"
            yield Diagnosis("note", what, f"{free:.1f} GiB free in {nearest}", mend)
        else:
            yield Diagnosis("ok", what, f"{free:.0f} GiB free in {nearest}")


def limits() -> Iterator[Diagnosis]:
    """What the shell allows a process."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    level, mend = ("note", "ulimit -n 65536 in the job script") if files < 4096 else ("ok", "")
    yield Diagnosis(level, "open files", str(files), mend)


def build_locks(folder: Path) -> Iterator[Diagnosis]:
    """Locks that a killed compilation left behind: every later run waits for them without a word."""
    locks = list(folder.rglob("lock")) if folder.is_dir() else []
    for lock in locks:
        yield Diagnosis("wrong", "build lock", str(lock), f"unless something is compiling right now: rm {lock}")
    if not locks:
        yield Diagnosis("ok", "build locks", "none")


def kernels() -> Iterator[Diagnosis]:
    """Which attention kernels work here for bf16 heads of 128 (fp32 on CPUs), and why the others do not."""
    import torch

    from ds_longft.sequence.kernels.base import AttentionSpec, Job
    from ds_longft.sequence.kernels.table import KERNELS

    cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else None
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    job = Job(device, dtype, 128, AttentionSpec(scale=128**-0.5), capability)
    fitting, refused = [], []
    for kernel in KERNELS:
        why = kernel.refuses(job)
        if why is None:
            fitting.append(kernel.name)
        elif not why.startswith("runs on "):
            refused.append(f"{kernel.name} {why}")
    seen = ", ".join(fitting) or "none"
    yield Diagnosis("ok" if fitting else "wrong", "attention kernels", seen, "; ".join(refused))


def tracking() -> Iterator[Diagnosis]:
    """Whether wandb, where it is installed, would take a run."""
    if _version_or_none("wandb"):
        problem = wandb_login_problem()
        yield Diagnosis("note", "wandb", *problem.split(": ", 1)) if problem else Diagnosis("ok", "wandb", "logged in")


def _version_or_none(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
