"""At which length attention costs a model as much as all else. Read off the model's code, which imports torch, and kept
beside the tokenized sets: the next `ds-longft data stats` of that model waits for neither.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from ds_longft import __version__
from ds_longft.config.run_config import ModelConfig, RunConfig
from ds_longft.data.pack_plan import EQUAL_COST_TOKENS
from ds_longft.errors import LongftError
from ds_longft.model.hidden_torch import show_torch


def cost_of_run(run: RunConfig) -> int:
    """`equal_cost_tokens` of a run's model, from the cache where an earlier command has asked. Before transformers is
    imported: that may be without torch.
    """
    lora = run.lora is not None
    kept = _kept(run, lora)
    if kept is not None and kept.is_file() and (text := kept.read_text(encoding="utf-8")).isdecimal():
        return int(text)
    show_torch()
    cost = equal_cost_tokens(run.model, lora=lora)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(str(cost), encoding="utf-8")
    return cost


def equal_cost_tokens(model: ModelConfig, *, lora: bool) -> int:
    """As `ModelFacts.equal_cost_tokens`; of an 8B model where the config cannot be read (a folder with a tokenizer)."""
    from ds_longft.model.facts import ModelFacts
    from ds_longft.model.read_model import read_config

    try:
        return ModelFacts.from_config(read_config(model)).equal_cost_tokens(lora=lora)
    except LongftError:
        return EQUAL_COST_TOKENS


def _kept(run: RunConfig, lora: bool) -> Path | None:
    """Where the number of this config.json is kept, for these versions of the code that reads it."""
    config = Path(run.model.path).expanduser() / "config.json"
    if not config.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(run.model.path, "config.json", revision=run.model.revision)
        except ValueError:  # no id of a hub
            return None
        if not isinstance(found, str):
            return None
        config = Path(found)
    seen = f"{__version__} {version('transformers')} {lora}".encode() + config.read_bytes()
    return Path(run.data.cache_dir).expanduser() / f"cost-{hashlib.sha256(seen).hexdigest()[:24]}"
