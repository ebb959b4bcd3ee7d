"""The job, ranks forked from a warm server for most runs, and one run by the real `deepspeed` that many tests look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import free_port
from tests.e2e.job import write_job
from tests.faults.ranks import Launcher

ROOT = Path(__file__).resolve().parents[2]


def start(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of this environment in the clone, as a user would, on the CPU."""
    program = Path(sys.executable).with_name(command[0])
    settings = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [program, *command[1:]], cwd=ROOT, env={**os.environ, **settings, **env}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml of the job."""
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="session")
def ranks(job: Path) -> Iterator[Launcher]:
    """Starts runs of the job whose ranks need no second to start."""
    launcher = Launcher(job)
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def sp2(job: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(output folder, console) of the job on two ranks that share each sample, under the real `deepspeed`."""
    output = tmp_path_factory.mktemp("sp2") / "out"
    done = start(
        "deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "launch/train.py",
        "--ds_config", "ds_configs/zero3_sp.json", "--config", str(job), "--output_dir", str(output), "--sp", "2",
        "--log.wandb", "offline", WANDB_SILENT="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout + done.stderr
