"""Will this run work here? Every reason why not, within milliseconds, before a model is loaded or torch is imported.

Each text names every key that the check reads: `read` leaves out those that name a key whose value is wrong.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

from ds_longft.config.data_keys import SourceConfig, is_pattern
from ds_longft.config.ds_file import load_ds_config
from ds_longft.config.ds_json import DeepSpeedSettings, Device, merge_ds_config
from ds_longft.config.endings import SUFFIXES, UNREAD, not_read, suffix_of
from ds_longft.config.model_json import (
    HUB_ID,
    divisors,
    head_problems,
    length_problems,
    model_problems,
    read_model_config,
    text_config,
)
from ds_longft.config.optimizers import KINDS
from ds_longft.config.run_config import RunConfig
from ds_longft.config.shipped import TEMPLATES, find_template
from ds_longft.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

T = TypeVar("T")


def preflight(config: RunConfig, *, world: int, local_world: int, device: Device) -> tuple[DeepSpeedSettings, int]:
    """Read the JSON and the model's config, merge, check: the settings for the engine, and sp.

    `world` counts all ranks, `local_world` those of this node. Raises ConfigError with the problems of all three.
    """
    problems: list[str] = []

    def found(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except ConfigError as error:
            problems.extend(problem for problem in error.problems if problem not in problems)
            return None

    model_config = found(lambda: read_model_config(config))
    hidden_size = text_config(model_config or {}).get("hidden_size")
    settings = found(
        lambda: merge_ds_config(
            load_ds_config(config.ds_config), config, world=world, device=device, hidden_size=hidden_size
        )
    )
    sp = found(lambda: check_run(config, world=world, local_world=local_world, ds=settings, model_config=model_config))
    if settings is None or sp is None or problems:
        raise ConfigError(problems)
    return settings, sp


def check_run(
    config: RunConfig,
    *,
    world: int,
    local_world: int,
    ds: DeepSpeedSettings | None,
    model_config: dict[str, Any] | None,
) -> int:
    """sp, or one ConfigError with everything that keeps this run from working on `world` ranks.

    `model_config` is the parsed config.json of a local model, None for a hub model: its checks then wait for the load.
    `ds` is None where the JSON could not be read.
    """
    sp, problems = 0, []
    try:
        sp = resolve_sp(config, ds, world, local_world)
    except ConfigError as error:
        problems += error.problems
    problems += problems_of_paths(config)
    if model_config is not None:
        problems += model_problems(config, model_config)
        problems += head_problems(text_config(model_config), sp, world)
    problems += length_problems(config, text_config(model_config or {}))
    problems += _folder_problems("output_dir", config.output_dir)
    problems += _folder_problems("data.cache_dir", config.data.cache_dir)
    problems += [
        f"log: the tracker {name} is not installed: pip install {name}, or leave it out of log.trackers and log.wandb"
        for name in config.log.tracker_names
        if not _is_installed(name)
    ]
    package, lora = KINDS[config.optim.type].package, config.lora
    if package and not _is_installed(package):
        problems.append(f"optim.type is {config.optim.type}, whose package is not installed: pip install {package}")
    if lora is not None and lora.init_from:
        folder = Path(lora.init_from).expanduser()
        if not (folder / "adapter_config.json").is_file():
            problems.append(f"lora.init_from: no adapter_config.json in {folder}: give the folder of an adapter")
    if lora is not None and lora.targets in ("", []):
        problems.append(
            "lora.targets is empty: give all-linear or names such as [q_proj, v_proj]; lora: null trains all"
        )
    if problems:
        raise ConfigError(problems)
    return sp


def problems_of_paths(config: RunConfig) -> list[str]:
    """What model.path and the data name, and is not here."""
    return _model_folder_problems(config) + _data_problems(config)


def resolve_sp(config: RunConfig, ds: DeepSpeedSettings | None, world: int, local_world: int) -> int:
    """GPUs that share one sample: key sp, else the JSON's sequence_parallel_size, else all ranks of a node.

    Raises ConfigError where the two contradict, or sp does not divide the world.
    """
    of_json, in_json = ds.sp if ds else None, f"sequence_parallel_size in {config.ds_config}"
    if isinstance(config.sp, int) and of_json not in (None, config.sp):
        raise ConfigError(
            f'sp is {config.sp}, {in_json} is {of_json}: leave one of them out (sp: auto, or "auto" in the JSON)'
        )
    if isinstance(config.sp, int):
        sp, key = config.sp, "sp"
    else:
        sp, key = (of_json, in_json) if of_json else (local_world, "sp (auto: all ranks of a node)")
    if world % sp:
        fitting = ", ".join(map(str, divisors(world)))
        more = "; start more ranks (deepspeed --num_gpus N)" if sp > world else ""
        raise ConfigError(
            f"{key} is {sp}, which does not divide the world of this run (ranks: {world}): possible are {fitting}{more}"
        )
    return sp


def _model_folder_problems(config: RunConfig) -> list[str]:
    """The folder named by model.path, as far as it can be judged without opening weights."""
    given = config.model.path
    if not given:
        return ["model.path is empty: give a local Hugging Face folder or a hub id such as Qwen/Qwen3-8B"]
    folder = Path(given).expanduser()
    if not folder.exists():
        if HUB_ID.fullmatch(given):
            return []
        return [
            f"model.path: there is no {given}; expected a local Hugging Face folder or a hub id such as Qwen/Qwen3-8B"
        ]
    if not folder.is_dir():
        return [f"model.path: {given} is a file, expected the folder around it"]
    if config.model.revision is not None and not config.model.trust_remote_code:
        return [f"model.revision is {config.model.revision}, but model.path is a folder, which has none: leave it out"]
    if not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").exists()
        hint = (
            "it holds an adapter: to go on from it give its base here and this folder as lora.init_from, or merge it "
            "with `ds-longft export`"
            if is_adapter
            else "seen none"
        )
        return [f"model.path: {given} should hold config.json, but {hint}"]
    problems = []
    if not config.model.random_weights and not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        seen = f"only {others[0]}" if others else "none"
        problems.append(
            f"model.path: {given} should hold *.safetensors, seen {seen}: convert the weights, or rehearse without any "
            f"with model.random_weights: true"
        )
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        problems.append(f"model.path: {given} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)})")
    return problems


def _data_problems(config: RunConfig) -> list[str]:
    problems = []
    if not config.data.train:
        problems.append("data.train is empty: name at least one source, e.g. --data.train my.jsonl")
    sources = [("data.train", s) for s in config.data.train] + [("data.eval", s) for s in config.data.eval]
    problems += [
        f"{key}: there is no {source.path}; expected a file, a folder or a hub id"
        for key, source in sources
        if _is_missing(source)
    ]
    problems += [
        f"{key}: {source.path} has an unknown ending: {why}"
        for key, source in sources
        if Path(source.path).expanduser().is_file() and (why := not_read(Path(source.path)))
    ]
    template = config.data.chat_template
    if template is not None and not find_template(template).is_file():
        names = ", ".join(sorted(file.name for file in TEMPLATES.glob("*.jinja")))
        problems.append(f"data.chat_template: there is no file {template}, nor is it one of the shipped {names}")
    return problems


def _is_missing(source: SourceConfig) -> bool:
    """Whether a path that can only be meant locally does not exist."""
    path = Path(source.path).expanduser()
    if "://" in source.path:
        return False
    if is_pattern(source.path):
        return not path.exists() and not glob(str(path))
    is_file = suffix_of(path) in {*SUFFIXES, *UNREAD} or ("." in source.path and "/" not in source.path)
    return not path.exists() and (bool(is_file) or not HUB_ID.fullmatch(source.path))


def _is_installed(library: str) -> bool:
    """Whether it can be imported; a folder of that name, as wandb makes one, is none."""
    if library in sys.modules:
        return True
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None


def _folder_problems(key: str, given: str) -> list[str]:
    """The folder exists and is writable, or can be made; its name goes into scripts and logs line by line."""
    if not given.isprintable():
        return [f"{key} is {given!r}: give a name without control characters"]
    nearest = folder = Path(given).expanduser().absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        return [f"{key} is {given}, but {nearest} is a file: give another folder"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        made = "written to" if nearest == folder else f"made: no right to write in {nearest}"
        return [f"{key} {given} cannot be {made}"]
    return []
