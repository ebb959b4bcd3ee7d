"""The text model inside a multimodal checkpoint: the wrapper itself, built without what images and sound go through.

Names of weights are then the wrapper's own: adapters and saved models fit it. The towers are neither read nor given
memory (transformers builds a model without memory before it reads), and come back into what is saved: `save_whole`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import cached_file

from ds_longft.errors import ModelError

PREPARATION_FILES = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip


def is_wrapped(hf_config: PretrainedConfig) -> bool:
    """Whether the config wraps that of a text model."""
    return hf_config.get_text_config() is not hf_config


def whole_class(hf_config: PretrainedConfig) -> Any:
    """The class whose `from_pretrained` loads all of a checkpoint, towers included."""
    _mend(hf_config)
    other = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(hf_config), None)
    if is_wrapped(hf_config):
        return other
    # Mistral 4 is listed beside the wrapper that it comes in, and is none
    return AutoModelForCausalLM if other is None or type(hf_config) in MODEL_FOR_CAUSAL_LM_MAPPING else other


def text_class(hf_config: PretrainedConfig) -> Any:
    """The class whose `from_pretrained` loads what is trained: of a wrapper, its decoder, embeddings and head."""
    whole = whole_class(hf_config)
    return _part_of(whole, text=True) if is_wrapped(hf_config) else whole


def make(model_class: Any, hf_config: PretrainedConfig, **keywords: Any) -> PreTrainedModel:
    """A model with random weights of one of these classes. It keeps the config, and changes its dtype.
    Raises ModelError: a package is missing that a multimodal model's towers are made with, though they are left out.
    """
    auto = model_class is AutoModelForCausalLM
    from_config = AutoModelForCausalLM.from_config if auto else model_class._from_config
    try:
        model: PreTrainedModel = from_config(hf_config, **keywords)
    except ImportError as error:
        said = str(error).strip().splitlines()[0]
        raise ModelError(f"transformers cannot build {hf_config.model_type} here: {said}") from error
    return model


def name_of(model: nn.Module, part: nn.Module) -> str:
    """A module's name in a model, as `model.language_model`."""
    return next(name for name, module in model.named_modules() if module is part)


def on_meta(model_class: Any, hf_config: PretrainedConfig) -> PreTrainedModel:
    """A model of one of these classes without memory: its modules, their shapes, what its weights are called in files.

    Of a copy of the config: the attention's name is written into the one that a model is made of.
    """
    with torch.device("meta"):
        return make(model_class, copy.deepcopy(hf_config), attn_implementation="eager")


def save_whole(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """`save_pretrained` of a text model's weights and of all that `text_class` left out, read from where it came from,
    in the text model's dtype; with the files that images and sound are prepared by.
    """
    config, base = model.config, model.config.name_or_path
    if Path(base).is_dir() and not any(Path(base).glob("*.safetensors")):  # a rehearsal with random weights
        model.save_pretrained(folder, state_dict=state)
        return
    unset_hf_deepspeed_config()  # one rank alone reads them
    source = {"revision": config._commit_hash} if getattr(config, "_commit_hash", None) else {}
    how = {"dtype": model.dtype, "use_safetensors": True, "attn_implementation": "eager", **source}
    towers = _part_of(whole_class(config), text=False).from_pretrained(base, config=copy.deepcopy(config), **how)
    whole = on_meta(whole_class(config), config)
    whole.config.use_cache = True  # off for training only
    whole.save_pretrained(folder, state_dict={**towers.state_dict(), **state})
    copy_preparation(base, folder, **source)


def copy_preparation(base: str, folder: Path, **source: Any) -> None:
    """Copy the files that images and sound are prepared by from a model on disk or on the hub, where it has them."""
    for name in PREPARATION_FILES:
        file = cached_file(base, name, _raise_exceptions_for_missing_entries=False, **source)
        if file is not None:
            shutil.copy2(file, folder / name)


def _mend(hf_config: PretrainedConfig) -> None:
    """What is wrong in transformers 5.24: what two models say of their decoder and head, and the forward of Llama 4's
    wrapper, which fails on any input, for it reads `image_outputs` of its text model's output, which has none.
    """
    if hf_config.get_text_config().model_type == "llama4_text":
        from transformers.models.llama4 import modeling_llama4 as llama4

        llama4.Llama4ForCausalLM.get_decoder = lambda self: self.model
        of_text = getattr(llama4, "MoeCausalLMOutputWithPast", None)  # 5.17 has another, and no such fault
        if of_text is not None and not hasattr(of_text, "image_outputs"):
            llama4.MoeCausalLMOutputWithPast = type(of_text.__name__, (of_text,), {"image_outputs": None})
    if hf_config.model_type == "nemotron_h_omni":
        omni = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(hf_config)]
        omni.get_decoder = lambda self: self.language_model.get_decoder()
        omni.get_output_embeddings = lambda self: self.language_model.get_output_embeddings()


@cache
def _part_of(whole: type[PreTrainedModel], *, text: bool) -> type[PreTrainedModel]:
    """A wrapper's class that builds its text model alone, or all but that; for transformers it is the same class."""

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **keywords: Any) -> None:
        for part in (getattr(config, name) for name in config.sub_configs):
            if isinstance(part, PretrainedConfig) and part is not config.get_text_config():
                part._attn_implementation = "eager"  # some towers know transformers' own names alone
        whole.__init__(self, config, *args, **keywords)
        kept = [self.get_decoder(), self.get_output_embeddings()]
        outside = list(_outside(self, kept))
        left_out = outside if text else [name for name, module in self.named_modules() if module in kept]
        for name in left_out:
            parent, _, child = name.rpartition(".")
            holder = self.get_submodule(parent)
            weight = child in holder._parameters
            delattr(holder, child)
            if weight:
                setattr(holder, child, torch.empty(0))  # for transformers, which draws it at random
        self._keys_to_ignore_on_load_unexpected |= {"^" + name.replace(".", r"\.") for name in left_out}
        if not text:
            self._tied_weights_keys = self.all_tied_weights_keys = {}

    return type(whole.__name__, (whole,), {"__init__": __init__, "__module__": whole.__module__})


def _outside(model: nn.Module, kept: list[nn.Module], prefix: str = "") -> Iterator[str]:
    """Names of the modules that hold none of those, the outermost of each branch, and of weights beside them: rows
    that stand for the end of a line of an image (LLaVA-NeXT), which weight decay would change.
    """
    yield from (prefix + name for name, _ in model.named_parameters(recurse=False))
    for name, child in model.named_children():
        if any(child is one for one in kept):
            continue
        if any(module is one for module in child.modules() for one in kept):
            yield from _outside(child, kept, f"{prefix}{name}.")
        else:
            yield prefix + name
