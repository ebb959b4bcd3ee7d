"""What a notebook or a script calls: plan, verify, train. Each is a command of `ds-longft` with its result as a value.

Ranks are processes of their own, so the calling process holds no GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_longft.config.read import dump_config, load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError, LongftError

__all__ = ["RunConfig", "load_run_config", "plan", "train_from", "verify"]

Run = RunConfig | str | Sequence[str]
"""A run config: itself, its file, or the words of a command line, `["mine.yaml", "--sp", "4"]`."""


def plan(
    model: Run, *, gpus: int = 8, gpu: str = "h100-80", length: int | str | None = None, full: bool = False,
    lora_r: int | None = None, host_gib: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Memory and time of a step before a GPU is touched, as `ds-longft plan --json` prints it.

    Of a model with `length` (tokens, `"128K"`): the fastest setting that fits. Without: `{"longest": [...]}`, the
    longest pack of each sp. Of a run config: the run as it is configured. Raises ConfigError where nothing fits.
    """
    from ds_longft.decide.plan_json import as_json  # torch and transformers, which a notebook that trains needs not
    from ds_longft.tools.plan.asked import Asked
    from ds_longft.tools.plan.command import answer, question_of
    from ds_longft.tools.plan.run_plan import plan_of_run

    if isinstance(model, str) and not model.endswith((".yaml", ".yml")):
        return answer(*question_of(model, gpus, gpu, host_gib, Asked(length, lora_r), full=full))
    if full or (length, lora_r) != (None, None):
        raise ConfigError("plan: length, full and lora_r are for a model alone: a run config has keys for them")
    with _words(model) as words:
        found, question = plan_of_run(words, gpus, gpu, host_gib)
    return as_json(found, question)


def verify(run: Run, *, ranks: int | None = None, layers: int | None = None) -> dict[str, Any]:
    """Does splitting change what this run trains? The object of `ds-longft verify --json`: `ok`, `findings` and more.

    Raises LongftError for a mistake in the config; a check that fails is `ok: False`.
    """
    given = {"--ranks": ranks, "--layers": layers}
    flags = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    with _words(run) as words:
        command = [sys.executable, "-m", "ds_longft.cli", "verify", *words, *flags, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise LongftError(done.stderr.strip())
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def train_from(run: Run, *, ranks: int | None = None) -> Path:
    """Train, or go on with, a run; returns its output folder. What the run says is printed as it comes.

    `ranks`: GPUs, or CPU processes where there is none. Left out: all GPUs. Raises LongftError where the run does not
    end with its last step; `run_status.json` in the folder has its exit code.
    """
    config = run if isinstance(run, RunConfig) else load_run_config(run)
    with _words(config) as words:
        command = [sys.executable, "-m", "ds_longft.ranks.launch", "--ranks", str(ranks or "all"), *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            lines = [line for line in process.stdout if print(line, end="", flush=True) is None]
    if process.returncode:
        raise LongftError(f"exit code {process.returncode}:\n{''.join(lines[-20:])}")
    return Path(config.output_dir).expanduser()


@contextmanager
def _words(run: Run) -> Iterator[list[str]]:
    """A run as words of a command line; a RunConfig lies in a file as long as they are used."""
    if not isinstance(run, RunConfig):
        yield [run] if isinstance(run, str) else list(run)
        return
    with tempfile.TemporaryDirectory(prefix="ds_longft-") as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(dump_config(run), encoding="utf-8")
        yield [str(path)]
