"""`ds-longft train|check|config`: a run config, looked at and started.

`train` starts the ranks that `deepspeed launch/train.py` starts, with the same keys, but not by DeepSpeed's launcher:
that imports torch before a rank does, and answers Ctrl-C with a traceback while the ranks are saving.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from ds_longft.command_line import RunKeys
from ds_longft.config.ds_file import stage_asked
from ds_longft.config.model_json import HUB_ID, read_model_config
from ds_longft.config.preflight import preflight, problems_of_paths
from ds_longft.config.read import dump_chosen, dump_config, load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import EXIT_UNCHECKED, ConfigError, ModelError
from ds_longft.ranks.join import visible_gpus
from ds_longft.ranks.launch import launch_ranks
from ds_longft.tools import quickstart
from ds_longft.train.trackers import wandb_login_problem


def train(config: RunKeys, *, gpus: int | None = None) -> None:
    """Check a run config, then train it on the GPUs of this machine, all of which share each sample unless --sp says
    otherwise. Without a config it trains a small real model on a small real job.

    The same, and the way to several machines: `deepspeed launch/train.py mine.yaml` from a clone,
    `deepspeed --module ds_longft.train mine.yaml`, `torchrun --nproc-per-node 8 launch/train.py mine.yaml`.
    Exit code 75: stopped by a signal or the end of its time, and saved; the same command goes on.

    Args:
        config: run config.
        gpus: how many GPUs to use. Left out: all. Without a GPU: CPU processes. Left out: 1, for the quickstart 2.
    """
    words = list(_words(config))
    here = visible_gpus()
    keys = quickstart.or_quickstart(words, has_gpu=here > 0)
    ranks = gpus if gpus is not None else here or (2 if keys != words else 1)
    if here and ranks > here:
        raise ConfigError(f"--gpus is {ranks}, this machine has {here} GPUs")
    print(_checked(keys, ranks, on_gpu=here > 0)[0], flush=True)
    raise SystemExit(launch_ranks("ds_longft.train", words, ranks=ranks, gpus=here, hand_on=True))


def check(config: RunKeys, *, gpus: int | None = None) -> int:
    """Make all checks of a start without starting: keys, files, DeepSpeed JSON, heads and window of the model.

    Exit code 0: all is right. 64: it is not, and what is wrong is listed. 66: nothing is wrong as far as can be seen,
    but the model's config could not be read, as of a hub id without a network.

    Args:
        config: run config.
        gpus: for N GPUs of one node, also on a machine without any. Left out: those of this machine.
    """
    here = visible_gpus()
    text, whole = _checked(list(_words(config)), gpus if gpus is not None else here or 1, on_gpu=bool(here or gpus))
    print(text)
    return 0 if whole else EXIT_UNCHECKED


def config(config: RunKeys, *, all: bool = False) -> None:
    """Write a run config as YAML: the keys that differ from their defaults, each with what it is.

    Files and models that are not here are named on stderr, and do no harm: the config may be for another machine.

    Args:
        config: keys, behind a file or without one.
        all: every key instead, without comments.
    """
    run = load_run_config(config)
    print(dump_config(run) if all else dump_chosen(run), end="", flush=True)
    for problem in problems_of_paths(run):
        print(f"note: {problem}", file=sys.stderr)


def _words(config: RunKeys) -> tuple[str, ...]:
    return (config,) if isinstance(config, str) else config


def _checked(keys: list[str], ranks: int, *, on_gpu: bool) -> tuple[str, bool]:
    """One line on a run whose config has no mistake, and whether its model was looked at too. Raises ConfigError with
    all mistakes.
    """
    if ranks < 1:
        raise ConfigError(f"--gpus is {ranks}: expected 1 or more")
    look = partial(preflight, world=ranks, local_world=ranks, device="cuda" if on_gpu else "cpu")
    run: RunConfig = load_run_config(keys, partial(quickstart.without_its_files, look))
    quickstart.prepare(run)
    _fetch_config(run)
    _, sp = look(run)
    whole = read_model_config(run) is not None
    unread = (
        ""
        if whole
        else ", but for the model: its config cannot be read here (window, heads and type are unchecked): the hub "
        "does not answer; a local folder (`hf download`) is checked whole"
    )
    what = f"LoRA r {run.lora.r}" if run.lora else "all weights"
    text = (
        f"{shlex.join(keys)}: checked{unread}. {run.model.path}, {what}, "
        f"samples of up to {run.data.max_length_tokens:,} tokens, "
        f"{ranks} x {'GPU' if on_gpu else 'CPU'} (sp {sp} x dp {ranks // sp}), {stage_asked(run.ds_config)}, "
        f"into {run.output_dir}{_untracked(run)}"
    )
    return text, whole


def _fetch_config(run: RunConfig) -> None:
    """Have the config.json of a hub id in the hub's cache, where the hub answers: the checks read it there."""
    if not HUB_ID.fullmatch(run.model.path) or Path(run.model.path).expanduser().exists():
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    from ds_longft.model.reach import check_reach

    with suppress(ModelError, HfHubHTTPError, OSError, ValueError):  # `_checked` says that it is unread
        check_reach(run.model.path, run.model.revision)
        hf_hub_download(run.model.path, "config.json", revision=run.model.revision)


def _untracked(run: RunConfig) -> str:
    """A line where wandb would be lost, which keeps no run from training."""
    online = "wandb" in run.log.tracker_names and run.log.wandb != "offline"
    problem = wandb_login_problem() if online else None
    return f"\nwandb: {problem}" if problem else ""
