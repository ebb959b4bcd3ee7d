"""`ds-longft slurm render|submit`: `launch/*.sbatch` filled from a run config, checked before they wait in a queue."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from string import Template

from ds_longft.command_line import RunKeys
from ds_longft.config.preflight import preflight
from ds_longft.config.read import load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.config.shipped import find_file
from ds_longft.errors import ConfigError
from ds_longft.tools.slurm.job import JOB, Job

TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
NAME = re.compile(r"[\w.,-]+")
OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[^\s\"'\\]+)?")
OWN_OPTIONS = (
    "--job-name", "--nodes", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--time", "--signal",
    "--requeue", "--no-requeue", "--open-mode", "--output", "--error", "--partition", "--account",
)  # fmt: skip


def render(config: RunKeys, *, job: Job = JOB, out: str | None = None) -> None:
    """Print (or write to --out) the sbatch script that trains this run config, one srun task for each GPU.

    What can be checked without the nodes is checked: the config, the DeepSpeed JSON, the model's heads against sp,
    and that sp groups stay inside a node where they fit.

    Args:
        config: run config; keys behind the file become keys of the job.
        out: file to write.
    """
    script = fill(config, job)
    if out is None:
        print(script, end="")
    else:
        Path(out).write_text(script)
        print(f"written: {out}. Submit it with: sbatch {shlex.quote(out)}")


def submit(config: RunKeys, *, job: Job = JOB) -> None:
    """Check a run config and fill its sbatch script, keep that in the output folder as job.sbatch, hand it to sbatch.

    Args:
        config: run config; keys behind the file become keys of the job.
    """
    script = fill(config, job)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch here: run this on a login node, or use `ds-longft slurm render --out job.sbatch`"
        )
    folder = Path(load_run_config(config).output_dir).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.sbatch"
    path.write_text(script)
    done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"sbatch refused {path}: {done.stderr.strip()}")
    print(f"{done.stdout.strip()}; script: {path}; log: {folder}/slurm-<job>.log")


def limit_s(time: str) -> int:
    """Seconds of a SLURM time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(n * unit for n, unit in zip(parts, units, strict=False))


def fill(config: RunKeys, job: Job) -> str:
    """The script's text. Raises ConfigError with everything that keeps the run from working on that many GPUs."""
    words = (config,) if isinstance(config, str) else config
    options, problems = _options(job.sbatch or "")
    problems = _wrong_flags(job) + problems
    if job.before is not None and not Path(job.before).expanduser().is_file():
        problems.append(f"--before is {job.before}: there is no such file")
    if problems:
        raise ConfigError(problems)
    check = partial(preflight, world=job.nodes * job.gpus_per_node, local_world=job.gpus_per_node, device=job.device)
    run = load_run_config(config, check)
    _, sp = check(run)
    _check_groups(run, sp, job)
    if run.train.resume != "auto":
        raise ConfigError(
            f"train.resume is {run.train.resume}: every start of the job would do the same steps again. Set it to "
            "auto; to begin at another step, start once by hand"
        )
    if run.train.save_every_steps is None:
        print(
            "note: train.save_every_steps is not set, so a crash costs everything since the last stop", file=sys.stderr
        )
    template = "slurm.sbatch" if job.nodes == 1 else "slurm_multinode.sbatch"
    folder = Path(run.output_dir).expanduser().absolute()
    named = [f"{key}={value}" for key, value in (("--partition", job.partition), ("--account", job.account)) if value]
    return _Script(find_file(f"launch/{template}").read_text()).substitute(
        JOB=re.sub(r"[^\w.-]", "_", folder.name),
        NODES=job.nodes,
        TASKS=job.gpus_per_node,
        CPUS=job.cpus_per_gpu,
        GPUS=f"#SBATCH --gpus-per-node={job.gpus_per_node}"
        if job.device == "cuda"
        else "# no GPUs asked for: a rehearsal on CPUs",
        TIME=job.time,
        SIGNAL=job.signal_s,
        OPTIONS="\n".join(f"#SBATCH {option}" for option in [*named, *options])
        or "# partition and account: your defaults",
        BEFORE=_before(job.before),
        FOLDER=shlex.quote(str(folder)),
        WHERE=shlex.quote(os.getcwd()),
        PYTHON=shlex.quote(sys.executable),
        CONFIG=shlex.join([str(Path(w).absolute()) if Path(w).is_file() else w for w in words]),
        CRASHES=job.max_crashes,
        DEVICE="unset DS_ACCELERATOR" if job.device == "cuda" else "export DS_ACCELERATOR=cpu",
    )


def _wrong_flags(job: Job) -> list[str]:
    counts = ("nodes", "gpus_per_node", "signal_s", "cpus_per_gpu")
    problems = [f"--{key} is {getattr(job, key)}: give 1 or more" for key in counts if getattr(job, key) < 1]
    if not TIME.fullmatch(job.time):
        problems.append(f"--time is {job.time!r}: give minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    elif 0 < limit_s(job.time) <= job.signal_s:  # 0 is no limit
        problems.append(
            f"--signal_s is {job.signal_s}, not less than --time ({job.time}): every start would be told to stop at "
            "once"
        )
    problems += [
        f"--{key} is {name!r}: give letters, digits, '_', '-', '.' and ','"
        for key, name in (("partition", job.partition), ("account", job.account))
        if name and not NAME.fullmatch(name)
    ]
    if job.max_crashes < 0:
        problems.append(f"--max_crashes is {job.max_crashes}: give 0 or more")
    return problems


def _options(given: str) -> tuple[list[str], list[str]]:
    """(options of sbatch one by one, what is wrong with them)."""
    try:
        options = shlex.split(given)
    except ValueError as error:
        return [], [f"--sbatch is {given!r}: {error}"]
    problems = [
        f"--sbatch holds {option!r}: give --name or --name=value, and leave out what the script sets itself "
        f"({', '.join(OWN_OPTIONS)})"
        for option in options
        if not OPTION.fullmatch(option) or option.partition("=")[0] in OWN_OPTIONS
    ]
    return options, problems


def _before(file: str | None) -> str:
    """Lines that run a file of the user's in the script's own shell; such files count on unset variables."""
    if file is None:
        return "# --before: nothing"
    return f"set +u; . {shlex.quote(str(Path(file).expanduser().absolute()))} || exit 64; set -u"


class _Script(Template):
    """Blanks are written @{NAME}: the shell has the dollar sign."""

    delimiter = "@"


def _check_groups(run: RunConfig, sp: int, job: Job) -> None:
    """Ranks that share a sample talk in every layer: inside a node whenever they fit there."""
    nodes, gpus_per_node = job.nodes, job.gpus_per_node
    if sp <= gpus_per_node and gpus_per_node % sp:
        fitting = [d for d in range(1, gpus_per_node + 1) if gpus_per_node % d == 0]
        raise ConfigError(
            f"sp is {sp}, which does not divide the {gpus_per_node} GPUs of a node: groups would straddle nodes; "
            f"possible are {', '.join(map(str, fitting))}, or a multiple of {gpus_per_node}"
        )
    if sp > gpus_per_node and sp % gpus_per_node:
        raise ConfigError(
            f"sp is {sp}, more than the {gpus_per_node} GPUs of a node and no multiple of them: give a multiple, up to "
            f"{nodes * gpus_per_node}"
        )
