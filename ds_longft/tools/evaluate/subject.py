"""What is evaluated: a base model, an adapter on its base (with the RoPE it was trained with), or a full model.

`MODEL` is a Hugging Face folder, a hub id, or the output folder of a run; of a run, `--before` means the model it
started from, with its own RoPE: stretched and not trained, it is another and a worse one.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, PretrainedConfig

from ds_longft.config.model_keys import Quantize, RopeConfig
from ds_longft.config.read import config_of_run
from ds_longft.config.run_config import LoraConfig, ModelConfig, RunConfig
from ds_longft.decide.decisions import Run
from ds_longft.decide.held import STREAMED
from ds_longft.decide.setting import Base, Gpu
from ds_longft.errors import ConfigError
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load import load_config, load_model
from ds_longft.model.lora import BASE_CONFIG_FOLDER, WEIGHTS_NAME, load_adapter
from ds_longft.model.read_model import load_tokenizer, model_path
from ds_longft.model.rope import check_rope, window_tokens
from ds_longft.model.rope_formulas import rope_parts
from ds_longft.model.supported import decoder_layers
from ds_longft.train.frozen_base import load_frozen


@dataclass(frozen=True)
class Subject:
    """Where the weights, the RoPE and the tokenizer come from. Nothing is loaded yet."""

    base: ModelConfig
    adapter: Path | None
    config_folder: str
    """Where the model's config is read from: base_config/ of an adapter, else the model itself."""
    tokenizer_folder: str
    run: Path | None
    """Output folder of the run, where MODEL is one."""

    @property
    def shown(self) -> str:
        """How results call it."""
        return f"{self.base.path} + {self.adapter}" if self.adapter else self.base.path


@dataclass(frozen=True)
class Loaded:
    """A model ready to be asked. `model` may be a PEFT model, `plain` is the causal language model in it."""

    model: Any
    plain: Any
    device: torch.device


def find_subject(model: str, *, before: bool = False, base: str | None = None, quantize: Quantize = "auto") -> Subject:
    """Tell what `model` is. `quantize`: another format of its weights than the run's.

    Raises:
        ConfigError: `before` without a run, or a run that has no result yet.
    """
    found = _found(model, before, base)
    if quantize == "auto":
        return found
    return replace(found, base=found.base.model_copy(update={"quantize": quantize}))


def _found(model: str, before: bool, base: str | None) -> Subject:
    folder = Path(model).expanduser()
    run = folder if (folder / "config.yaml").is_file() else None
    if before:
        if run is None:
            raise ConfigError(f"--before: {model} is no output folder of a run (no config.yaml): give the base itself")
        started_from = config_of_run(folder).model
        unstretched = {"path": base or started_from.path, "random_weights": False, "rope": RopeConfig()}
        plain = started_from.model_copy(update=unstretched)
        return Subject(plain, None, model_path(plain), model_path(plain), run)
    if (folder / "adapter_config.json").is_file():
        if not (folder / WEIGHTS_NAME).is_file():
            raise ConfigError(f"{model} holds adapter_config.json but no {WEIGHTS_NAME}: is the run finished?")
        facts = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        named = base or facts.get("base_model_name_or_path")
        if not named:
            raise ConfigError(f"{folder / 'adapter_config.json'} names no base model: give --base")
        plain = ModelConfig(path=named, revision=facts.get("revision"), quantize=quantized_as(folder))
        trained = folder / BASE_CONFIG_FOLDER
        config_folder = str(trained) if trained.is_dir() else model_path(plain)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        return Subject(plain, folder, config_folder, str(folder) if has_tokenizer else model_path(plain), run)
    if run is not None and not (folder / "config.json").is_file():
        kept = [p.parent for p in folder.glob("checkpoint-*/adapter_config.json")]
        newest = max(kept, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
        instead = f"give its last checkpoint, {newest}" if newest else "it has no checkpoint with an adapter yet"
        raise ConfigError(
            f"{model} holds no adapter and no model yet: let the run finish, {instead}, or add --before for the model "
            "that it started from"
        )
    plain = ModelConfig(path=model)
    return Subject(plain, None, model_path(plain), model_path(plain), run)


def quantized_as(adapter: Path) -> Quantize:
    """`model.quantize` of the run that made this adapter, at its top or in a checkpoint: the base it belongs to."""
    run = next((folder for folder in (adapter, adapter.parent) if (folder / "config.yaml").is_file()), None)
    return config_of_run(run).model.quantize if run else "auto"


def subject_window(subject: Subject) -> int | None:
    """Tokens its positions are made for, without loading it."""
    return window_tokens(AutoConfig.from_pretrained(subject.config_folder))


def subject_config(subject: Subject, attention: str) -> PretrainedConfig:
    """The config that its model is built from, with the attention of that name."""
    hf_config = load_config(subject.base, 1, attn_implementation=attention)
    if subject.config_folder != model_path(subject.base):
        hf_config = AutoConfig.from_pretrained(subject.config_folder)
        hf_config.use_cache = hf_config.get_text_config().use_cache = False
        hf_config._attn_implementation = attention
    return hf_config


def load_subject(
    subject: Subject, device: torch.device, *, attention: str, weights: Base = "resident", local_world: int = 1
) -> Loaded:
    """The model in bf16 on a GPU, in float32 on a CPU, with the attention of that name; its RoPE is checked.

    `weights`: where those of decoder layers lie. Collective where they are sharded or on the host.

    Raises:
        ModelError: it cannot be loaded, or is of a kind that cannot be evaluated exactly.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hf_config, frozen = subject_config(subject, attention), None
    model: Any
    if weights in STREAMED:
        model, frozen = load_frozen(_as_a_run(subject, hf_config, weights, local_world), dtype, device)
    else:
        model = load_model(subject.base, hf_config, ds_engine_config=None, dtype=dtype, device=device)
    plain = model
    if subject.adapter is not None:
        model = load_adapter(model, subject.adapter)
        plain = model.get_base_model()
        model.to(device)
    if rope_parts(plain.config):
        check_rope(plain, plain.config)
    model.eval().requires_grad_(False)
    if frozen is not None:
        frozen.install(decoder_layers(plain))
    return Loaded(model, plain, device)


def _as_a_run(subject: Subject, hf_config: PretrainedConfig, weights: Base, local_world: int) -> Run:
    """As a run with this adapter would have its weights.

    Raises:
        ConfigError: an adapter that reads the weights when it is put in.
    """
    file = subject.adapter and subject.adapter / "adapter_config.json"
    adapter = json.loads(file.read_text(encoding="utf-8")) if file else {}
    if adapter.get("use_dora"):
        raise ConfigError(f"--weights {weights}, but DoRA reads the weights when adapters are put in: leave it out")
    lora = LoraConfig(modules_to_save=adapter.get("modules_to_save") or [])
    model = subject.base.model_copy(update={"base": weights})
    world, facts = dist.get_world_size(), ModelFacts.from_config(hf_config)
    return Run(
        RunConfig(model=model, lora=lora), {}, hf_config, facts, world, world, local_world, Gpu.load("h200"), False, "",
        False, weights,
    )  # fmt: skip


def subject_tokenizer(subject: Subject) -> Any:
    """The tokenizer it was trained with."""
    source = subject.base.model_copy(update={"path": subject.tokenizer_folder})
    if Path(subject.tokenizer_folder).is_dir():
        source = source.model_copy(update={"revision": None})
    return load_tokenizer(source)


def one_device() -> torch.device:
    """The GPU of a command that runs in one process, or the CPU."""
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return torch.device("cuda", 0) if cuda else torch.device("cpu")
