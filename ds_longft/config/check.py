"""Will this run work here? Every reason why not, within milliseconds, before a model is loaded or torch is imported.

What can only be known from the loaded model (its class, its live RoPE frequencies) is checked again in `model`.
Each text names every key that the check reads: `read` leaves out those that name a key whose value is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from glob import glob
from pathlib import Path
from typing import Any

from ds_longft.config.ds_file import load_ds_config
from ds_longft.config.ds_json import DeepSpeedSettings, Device, merge_ds_config
from ds_longft.config.endings import SUFFIXES, UNREAD, not_read, suffix_of
from ds_longft.config.optimizers import KINDS
from ds_longft.config.proof import proof_problem
from ds_longft.config.quantized import format_name, full_training_problem, stored_in
from ds_longft.config.run_config import ModelConfig, RunConfig, SourceConfig, is_pattern
from ds_longft.config.shipped import TEMPLATES, find_template
from ds_longft.config.state_families import OTHER_LAYERS, STATE_FAMILIES, STATE_HEADS, STATE_LAYERS
from ds_longft.config.window import reached_tokens, window_problem
from ds_longft.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")

SPLITTABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# State-space and linear-attention families whose config.json lists no layer types, and that are not spread over ranks.
RECURRENT_MODELS = re.compile(r"(falcon_)?mamba2?|zamba2?|rwkv.*|xlstm|recurrent_gemma")
ENCODERS = re.compile(
    r"(xlm-|cam)?(roberta|bert)(-.*)?|(al|distil|mobile|modern|squeeze)bert|deberta(-v2)?|electra|mpnet|vit.*|clip.*|siglip.*"
)
LENGTH_AWARE_ROPE = ("dynamic", "longrope")  # they choose their frequencies by the length, so no window ends them


def preflight(config: RunConfig, *, world: int, local_world: int, device: Device) -> tuple[DeepSpeedSettings, int]:
    """Read the JSON and the model's config, merge, check: the settings for the engine, and sp.

    `world` counts all ranks, `local_world` those of this node. Raises ConfigError with the problems of all three.
    """
    problems: list[str] = []
    settings = model_config = None
    try:
        model_config = read_model_config(config)
    except ConfigError as error:
        problems += error.problems
    try:
        raw = load_ds_config(config.ds_config)
        hidden_size = _text_config(model_config or {}).get("hidden_size")
        settings = merge_ds_config(raw, config, world=world, device=device, hidden_size=hidden_size)
    except ConfigError as error:
        problems += error.problems
    try:
        check_run(config, world=world, local_world=local_world, ds=settings, model_config=model_config)
    except ConfigError as error:
        problems += [p for p in error.problems if p not in problems]
    if problems or settings is None:
        raise ConfigError(problems)
    return settings, resolve_sp(config, settings, world, local_world)


def read_model_config(config: RunConfig) -> dict[str, Any] | None:
    """config.json of a local model folder, or of a hub id as the hub's cache has it; None where it has none. Raises
    ConfigError: not JSON.
    """
    path = Path(config.model.path).expanduser() / "config.json"
    if not config.model.path or not path.is_file():
        found = _in_cache(config.model)
        if found is None:
            return None
        path = found
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path: {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"model.path: {path} holds a {type(content).__name__}, expected an object {{...}}")
    return content


def _in_cache(model: ModelConfig) -> Path | None:
    """Where the hub's cache has config.json of a hub id."""
    if not HUB_ID.fullmatch(model.path) or Path(model.path).expanduser().exists():
        return None
    from huggingface_hub import try_to_load_from_cache  # half a second, and a folder needs none of it

    found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def resolve_sp(config: RunConfig, ds: DeepSpeedSettings, world: int, local_world: int) -> int:
    """GPUs that share one sample: key sp, else the JSON's sequence_parallel_size, else all ranks of a node.

    Raises ConfigError where the two contradict, or sp does not divide the world.
    """
    sp, problems = _resolve_sp(config, ds, world, local_world)
    if problems:
        raise ConfigError(problems)
    return sp


def check_run(
    config: RunConfig,
    *,
    world: int,
    local_world: int,
    ds: DeepSpeedSettings | None,
    model_config: dict[str, Any] | None,
) -> None:
    """Raise one ConfigError with everything that keeps this run from working on `world` ranks.

    `model_config` is the parsed config.json of a local model, None for a hub model: its checks then wait for the load.
    `ds` is None where the JSON could not be read.
    """
    sp, problems = _resolve_sp(config, ds, world, local_world)
    problems += _model_folder_problems(config)
    if model_config is not None:
        problems += _architecture_problems(model_config) or _proof_problems(config, model_config)
        stored = stored_in(model_config)
        name, problem = format_name(stored, config.model.quantize)
        problem = problem or full_training_problem(name, lora=config.lora is not None, stored=bool(stored))
        problems += [problem] if problem else []
        if sp:
            problems += _head_problems(_text_config(model_config), sp, world)
    problems += _length_problems(config, _text_config(model_config or {}))
    problems += _data_problems(config)
    problems += _folder_problems("output_dir", config.output_dir) + _folder_problems(
        "data.cache_dir", config.data.cache_dir
    )
    problems += [
        f"log: the tracker {name} is not installed: pip install {name}, or leave it out of log.trackers and log.wandb"
        for name in config.log.tracker_names
        if not _is_installed(name)
    ]
    package, kind = KINDS[config.optim.type].package, config.optim.type
    if package and not _is_installed(package):
        problems.append(f"optim.type is {kind}, whose package is not installed: pip install {package}")
    if config.lora is not None and config.lora.init_from:
        folder = Path(config.lora.init_from).expanduser()
        if not (folder / "adapter_config.json").is_file():
            problems.append(f"lora.init_from: no adapter_config.json in {folder}: give the folder of an adapter")
    if config.lora is not None and config.lora.targets in ("", []):
        problems.append(
            "lora.targets is empty: give all-linear or names such as [q_proj, v_proj]; lora: null trains all"
        )
    if problems:
        raise ConfigError(problems)


def problems_of_paths(config: RunConfig) -> list[str]:
    """What model.path and the data name, and is not here."""
    return _model_folder_problems(config) + _data_problems(config)


def _resolve_sp(config: RunConfig, ds: DeepSpeedSettings | None, world: int, local_world: int) -> tuple[int, list[str]]:
    """sp, or 0 with the reasons why there is none."""
    of_json = ds.sp if ds else None
    if isinstance(config.sp, int) and of_json not in (None, config.sp):
        return 0, [
            f"sp is {config.sp}, sequence_parallel_size in {config.ds_config} is {of_json}: "
            f'leave one of them out (sp: auto, or "auto" in the JSON)'
        ]
    if isinstance(config.sp, int):
        sp, key = config.sp, "sp"
    elif of_json:
        sp, key = of_json, f"sequence_parallel_size in {config.ds_config}"
    else:
        sp, key = local_world, "sp (auto: all ranks of a node)"
    if world % sp == 0:
        return sp, []
    fitting = ", ".join(str(d) for d in _divisors(world))
    more = "; start more ranks (deepspeed --num_gpus N)" if sp > world else ""
    return 0, [
        f"{key} is {sp}, which does not divide the world of this run (ranks: {world}): possible are {fitting}{more}"
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


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


def _text_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """The language part of a config that also has others."""
    text = model_config.get("text_config")
    return text if isinstance(text, dict) else model_config


def _architecture_problems(model_config: dict[str, Any]) -> list[str]:
    """Models that cannot be split along the sequence, by name."""
    kind = str(model_config.get("model_type", ""))
    prefix = f"model.path: {kind or 'this model'}"
    layers = _text_config(model_config)
    types = layers.get("layer_types") or layers.get("layers_block_type") or layers.get("block_types") or []
    known = SPLITTABLE_LAYERS | (STATE_LAYERS | OTHER_LAYERS if layers.get("model_type") in STATE_FAMILIES else set())
    other = sorted(set(map(str, types)) - known)
    if other:
        return [
            f"{prefix} has layers of type {', '.join(other)}, which carry state along the sequence or mask it "
            f"differently and cannot be split over GPUs exactly; possible are full, sliding and chunked attention"
        ]
    if RECURRENT_MODELS.fullmatch(kind):
        return [f"{prefix} has recurrent layers, which cannot be split over GPUs exactly; give an attention-only model"]
    if model_config.get("is_encoder_decoder") or ENCODERS.fullmatch(kind):
        return [f"{prefix} is an encoder; only causal (decoder-only) language models can be trained"]
    return []


def _proof_problems(config: RunConfig, model_config: dict[str, Any]) -> list[str]:
    """A model that nobody has compared, unless the run asks for it."""
    kind = str(model_config.get("model_type", ""))
    problem = proof_problem(kind, str(_text_config(model_config).get("model_type", kind)))
    return [problem] if problem and not config.model.unproved else []


def _head_problems(text: dict[str, Any], sp: int, world: int) -> list[str]:
    of_states = [(text.get(key), "heads in layers with a state") for key in STATE_HEADS]
    counts = [(text.get("num_attention_heads", text.get("n_head")), "query heads"), *of_states]
    heads, what = min(((n, what) for n, what in counts if isinstance(n, int)), default=(sp, ""), key=lambda of: of[0])
    if sp <= heads:
        return []
    largest = max(d for d in _divisors(world) if d <= heads)
    works = f"is {largest}" if largest == heads else f"with {world} ranks is {largest}, with {heads} ranks {heads}"
    return [f"sp is {sp}, but the model has {heads} {what} to share among GPUs: the largest sp that works {works}"]


def _length_problems(config: RunConfig, text: dict[str, Any]) -> list[str]:
    """The longest row against the positions the model knows, and RoPE keys that would go unused."""
    rope, length = config.model.rope, config.data.max_length_tokens
    problems = []
    if rope.theta is not None and rope.type != "abf":
        problems.append(
            f"model.rope.theta is {rope.theta:g}, but model.rope.type is {rope.type}: theta is for abf only"
        )
    if rope.attention_factor is not None and rope.type != "yarn":
        problems.append(
            f"model.rope.attention_factor is {rope.attention_factor:g}, but model.rope.type is {rope.type}: "
            "attention_factor is for yarn only"
        )
    if rope.factor is not None and rope.type == "none":
        problems.append(f"model.rope.factor is {rope.factor:g}, but model.rope.type is none: give a type, or no factor")
    window = text.get("max_position_embeddings", text.get("n_positions"))
    if not isinstance(window, int) or problems:
        return problems
    endless = bool(_rope_types(text) & set(LENGTH_AWARE_ROPE))
    problem = window_problem(rope, reached_tokens(window, _rope_settings(text)), length, endless=endless)
    return [problem] if problem else []


def _rope_types(text: dict[str, Any]) -> set[str]:
    """The model's own RoPE types; the keys changed their names over the years, and may be nested by layer type."""
    return {str(part.get("rope_type", part.get("type"))) for part in _rope_settings(text)}


def _rope_settings(text: dict[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for parameters in (text.get("rope_parameters"), text.get("rope_scaling")):
        if isinstance(parameters, dict):
            parts += [v for v in parameters.values() if isinstance(v, dict)] or [parameters]
    return parts


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
