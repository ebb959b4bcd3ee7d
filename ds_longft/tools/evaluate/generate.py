"""Greedy answers to long prompts: the prompt is read in chunks into one KV cache, then one token at a time is added."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ds_longft.config.state_families import STATE_FAMILIES
from ds_longft.errors import ModelError
from ds_longft.model.rope_lengths import cache_outdated, set_rope_lengths
from ds_longft.model.stops import stop_ids
from ds_longft.tools.evaluate.subject import Loaded

CHUNK_TOKENS = 8192
"""Of a prompt at a time: its activations, not the prompt's, are what a GPU holds beside weights and cache."""


@torch.no_grad()
def generate(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    chunk_tokens: int = CHUNK_TOKENS,
    min_new_tokens: int = 0,
) -> list[list[int]]:
    """The likeliest next tokens of each prompt, without the stop token that ended them.

    All prompts are of one length in tokens, so that a batch needs no padding. The model's attention must be `CACHED`.
    Memory: (prompt + new tokens) x layers x kv heads x head size x 2, for each prompt, and one chunk's activations.
    """
    lengths = {len(prompt) for prompt in prompts}
    assert len(lengths) == 1, f"prompts of {sorted(lengths)} tokens in one batch"
    ids = torch.tensor([list(prompt) for prompt in prompts], device=loaded.device)  # [B, n]
    cache = _new_cache(loaded)
    # Layers with a state start it anew with each chunk of several tokens, in transformers' own forward.
    state = loaded.plain.config.get_text_config().model_type in STATE_FAMILIES
    most = ids.shape[1] if state else max(1, chunk_tokens // len(prompts))
    logits = _logits(loaded, ids, cache, most)
    stop = torch.tensor(sorted(stop_ids), device=loaded.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=loaded.device)
    steps: list[Tensor] = []
    for i in range(max_new_tokens):
        if i < min_new_tokens:
            logits[:, stop] = float("-inf")
        token = logits.argmax(-1)  # [B]
        steps.append(token.masked_fill(done, -1))
        done |= torch.isin(token, stop)
        if i + 1 == max_new_tokens or bool(done.all()):
            break
        if cache_outdated(loaded.plain.config, ids.shape[1], ids.shape[1] + 1):
            cache = _new_cache(loaded)
        ids = torch.cat([ids, token[:, None]], 1)
        logits = _logits(loaded, ids, cache, most)
    stops = set(stop_ids) | {-1}
    return [_until(row, stops) for row in torch.stack(steps, 1).tolist()]


def _new_cache(loaded: Loaded) -> DynamicCache:
    """An empty cache. Without the config, sliding layers keep all keys and the attention cuts them; layers with a state
    have to be named by it.

    Raises:
        ModelError: the model wants a cache of its own.
    """
    text = loaded.plain.config.get_text_config()
    if text.model_type == "minimax":
        raise ModelError("minimax keeps its states in a cache of its own, which evaluation by answers does not make")
    return DynamicCache(config=text) if text.model_type in STATE_FAMILIES else DynamicCache()


def end_ids(loaded: Loaded, tokenizer: Any) -> set[int]:
    """Tokens that end an answer where the model is served: those of its tokenizer, config and generation config."""
    return set(stop_ids(tokenizer, loaded.plain.config, getattr(loaded.plain, "generation_config", None)))


def _logits(loaded: Loaded, ids: Tensor, cache: DynamicCache, most: int) -> Tensor:
    """Float32 logits [B, V] of what follows the text ids [B, n]. Capping would not change which is largest.

    What the cache lacks of the text is read, `most` tokens at a time, and its keys and values go into the cache.
    """
    decoder = loaded.plain.get_decoder()
    set_rope_lengths(decoder, [ids.shape[1]])  # a chunk is a part of the whole text
    positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
    start = cache.get_seq_length()
    for chunk, where in zip(ids[:, start:].split(most, 1), positions[:, start:].split(most, 1), strict=True):
        out = decoder(input_ids=chunk, position_ids=where, past_key_values=cache, use_cache=True)
    return loaded.plain.get_output_embeddings()(out.last_hidden_state[:, -1]).float()


def _until(row: list[int], stops: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]
