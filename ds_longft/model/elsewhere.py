"""Model folders that older programs read as newer ones do: both spellings of what transformers 5 renamed.

transformers 4, on which serving and converting programs build, finds no RoPE where only `rope_parameters` states it,
and takes the default base without a word. It knows neither the class `TokenizersBackend` nor a list of special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def spell_for_older_readers(folder: Path) -> None:
    """Add the older spellings to config.json and tokenizer_config.json of a folder, where they lie. Newer readers see
    what they saw before.
    """
    _rewrite(folder / "config.json", _with_older_rope)
    _rewrite(folder / "tokenizer_config.json", _with_older_tokenizer)


def _rewrite(file: Path, change: Any) -> None:
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        changed = change(dict(content))
        if changed != content:
            file.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` at the top; not where each type of layer has a RoPE of its own."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return config
    config["rope_theta"] = parameters["rope_theta"]
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    config["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return config


def _with_older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
