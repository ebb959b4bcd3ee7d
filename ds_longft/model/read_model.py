"""A model's config and tokenizer, as they are stored. transformers needs torch for neither (`hide_torch`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_longft.config.run_config import ModelConfig
from ds_longft.errors import ModelError
from ds_longft.model.reach import check_reach

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def read_config(model: ModelConfig) -> PretrainedConfig:
    """The model's config as it is stored. Raises ModelError: nothing readable at `model.path`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = model_path(model)
    check_reach(path, model.revision)
    try:
        return AutoConfig.from_pretrained(path, **source_of(model))
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"model.path: no model config can be read from {path!r}: {first_line(error)}") from error


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `model.add_tokens`.
    Raises ModelError: there is none at `model.path`.
    """
    from transformers import AutoTokenizer

    path = model_path(model)
    check_reach(path, model.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **source_of(model))
        tokenizer.add_tokens(model.add_tokens)
        tokenizer.chat_template = tokenizer.chat_template or _processors_template(path, model.revision)
        return tokenizer
    except Exception as error:  # every tokenizer backend has its own way to fail on a missing or broken file
        alone = (Path(path) / "tokenizer.model").is_file() and not (Path(path) / "tokenizer.json").is_file()
        hint = ". It holds tokenizer.model alone: `pip install sentencepiece`" if alone else ""
        raise ModelError(f"model.path: no tokenizer can be read from {path!r}: {first_line(error)}{hint}") from error


def _processors_template(path: str, revision: str | None) -> str | None:
    """The chat template beside what prepares images: older multimodal checkpoints keep it where no tokenizer looks."""
    from transformers.utils import cached_file

    for name in ("chat_template.json", "processor_config.json"):
        file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is not None and (found := json.loads(Path(file).read_text(encoding="utf-8")).get("chat_template")):
            return str(found)
    return None


def model_path(model: ModelConfig) -> str:
    """`model.path`, absolute where it is a local folder, so that adapters name their base wherever they are read from.
    Raises ModelError: empty, or a path on this machine that does not exist.
    """
    if not model.path:
        raise ModelError("model.path is not set: give a local Hugging Face folder or a hub id")
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if model.path.startswith((".", "/", "~")) or model.path.count("/") > 1:
        raise ModelError(f"model.path: there is no folder {str(folder)!r}")
    return model.path


def source_of(model: ModelConfig) -> dict[str, Any]:
    """Where from, and whether its code is run (only with a pinned revision, see `RunConfig`)."""
    if model.trust_remote_code and not model.revision:
        raise ModelError("model.trust_remote_code needs model.revision pinned to a full commit hash")
    source: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision:
        source["revision"] = model.revision
    return source


def first_line(error: BaseException) -> str:
    """What an error of a library says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
