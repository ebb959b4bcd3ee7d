"""The token that ends an answer, in everything that is served: generation_config.json, config.json, the tokenizer.

A base model given a chat template ends text with another token than the template ends an answer with. A server
reads these files, and would never stop.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig, PretrainedConfig

_MARK = "\ue000"  # a character no template writes


def end_of_answer(tokenizer: Any) -> int | None:
    """Id of the first added token that the chat template writes behind an answer; None where there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return None
    behind = tokenizer.encode(text.rpartition(_MARK)[2], add_special_tokens=False)
    added = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return next((token for token in behind if token in added), None) if _MARK in text else None


def stop_ids(*holders: Any) -> list[int]:
    """The `eos_token_id` of configs and tokenizers, one list."""
    ids: dict[int, None] = {}
    for holder in holders:
        value = getattr(holder, "eos_token_id", None)
        ids |= dict.fromkeys(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return list(ids)


def serve_stop(tokenizer: Any, config: PretrainedConfig, generation: GenerationConfig | None) -> str | None:
    """Put the token that ends an answer where it is looked for, in place; what was done, None where nothing had to be.

    What a model stops at by its own generation_config.json, or config.json where it has none, is left as it is.
    """
    stop = end_of_answer(tokenizer)
    stops = stop_ids(generation) or stop_ids(config)
    if stop is None or stop in (stops or stop_ids(tokenizer)):
        return None
    token, before = tokenizer.convert_ids_to_tokens(stop), tokenizer.eos_token
    for holder in (config, generation):
        if holder is not None:
            holder.eos_token_id = [*stops, stop]
    tokenizer.eos_token = token
    return (
        f"the chat template ends an answer with {token!r}, the model's end token is {before!r}: {token!r} is written "
        "into generation_config.json, config.json and the tokenizer beside it, so that it stops where it is served"
    )
