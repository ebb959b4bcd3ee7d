"""Greedy answers to long prompts: they are read as training reads a pack, then one token of each at a time is added.

Several prompts are the documents of one pack, so they may be of different lengths. Under sp every rank holds a slice of
the pack and the keys and values of its tokens, and computes each new token like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_longft.batch import IGNORE_INDEX
from ds_longft.data.pack import pack_of
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.model.rope_lengths import cache_outdated, set_rope_lengths
from ds_longft.model.stops import stop_ids
from ds_longft.objectives.forward import decode
from ds_longft.sequence.llama4 import take_over_temperatures
from ds_longft.sequence.mask import no_padding
from ds_longft.sequence.shard import shard
from ds_longft.sequence.state.carried import States
from ds_longft.sequence.state.families import spread_state_layers
from ds_longft.tools.evaluate.cached_attention import OnThisRank, PromptCache
from ds_longft.tools.evaluate.room import MLP_TILE_TOKENS
from ds_longft.tools.evaluate.subject import Loaded

ALONE = ParallelLayout(1, 0, 1)


class Reader:
    """Texts side by side, as far as they have been read. Collective over the sp group: all ranks call it alike."""

    def __init__(self, loaded: Loaded, layout: ParallelLayout = ALONE, kernel: str = "auto") -> None:
        self.loaded, self.layout, self.kernel = loaded, layout, kernel
        self.decoder = loaded.plain.get_decoder()
        spread_state_layers(loaded.plain)
        take_over_temperatures(loaded.plain)
        # transformers renames it: 5.24 takes both names, with a warning, and 5.40 the new one alone
        self.cache_is = "cache" if "cache" in signature(self.decoder.forward).parameters else "past_key_values"
        _tile_mlps(self.decoder)

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]], room_tokens: int | None = None) -> Tensor:
        """Float32 logits [B, V] of what follows each text, the same on every rank.

        `room_tokens`: how many may be added to each; None for none. Memory, with room: a rank's share of the texts'
        tokens, and the room, x layers with keys x kv heads x head size x 2; states of this rank's heads of each text.
        """
        tokens = [np.asarray(ids, dtype=np.int64) for ids in texts]
        untrained = [(ids, np.full_like(ids, IGNORE_INDEX), np.zeros(len(ids), dtype=np.float32)) for ids in tokens]
        pack = pack_of(untrained, self.layout.sp)
        batch = shard(pack, self.layout, self.loaded.device)
        mine = pack.part(self.layout.sp, self.layout.sp_rank)
        starts = pack.cu_seqlens[: len(texts)].tolist()
        spans = [(a, a + len(ids)) for a, ids in zip(starts, texts, strict=True)]
        held = [(max(a, mine.start), max(a, mine.start, min(b, mine.stop))) for a, b in spans]
        self.here = OnThisRank(
            keys=tuple(range(a - mine.start, b - mine.start) for a, b in held),
            first=tuple(low - a for (low, _), (a, _) in zip(held, spans, strict=True)),
            prompts=tuple(map(len, texts)),
            prompt_tokens=mine.stop - mine.start,
            group=self.layout.group,
        )
        self.lengths = [len(ids) for ids in texts]
        self.kept: dict[str, Any] = {}
        if room_tokens is not None:
            cache = PromptCache(len(texts) * room_tokens)
            self.kept = {self.cache_is: cache, "states": States(batch.documents, self.layout, len(texts))}
        hidden = decode(self.decoder, batch, self.layout, self.kernel, **self.kept)  # [s, D]
        if room_tokens is not None and not cache.layers_seen:
            raise ModelError(f"{type(self.decoder).__name__} keeps no keys where it is asked to: it cannot answer here")
        ends = [end - 1 for _, end in spans]
        return self._logits(hidden, [end - mine.start if mine.start <= end < mine.stop else None for end in ends])

    @torch.no_grad()
    def add(self, tokens: Sequence[int]) -> Tensor:
        """Float32 logits [B, V] of what follows each text with one more token."""
        self.lengths = [length + 1 for length in self.lengths]
        set_rope_lengths(self.decoder, self.lengths, [1] * len(tokens))
        device = self.loaded.device
        hidden = self.decoder(
            input_ids=torch.tensor([list(tokens)], device=device),  # [1, B]
            attention_mask=no_padding(len(tokens), device),
            position_ids=torch.tensor([self.lengths], device=device) - 1,
            use_cache=False,
            on_this_rank=self.here,
            **self.kept,
        ).last_hidden_state[0]
        rows = range(len(tokens))
        return self._logits(hidden, rows if self.layout.sp_rank == 0 else [None for _ in rows])

    def _logits(self, hidden: Tensor, rows: Sequence[int | None]) -> Tensor:
        """[B, V] by those ranks that know the row of a text's last token. Capping would not change which is largest."""
        head = self.loaded.plain.get_output_embeddings()
        known = [row for row in rows if row is not None]
        made = head(hidden[known or [0]]).float()
        logits = made.new_full((len(rows), made.shape[1]), -torch.inf)
        if known:
            logits[[i for i, row in enumerate(rows) if row is not None]] = made
        if self.layout.group is not None:
            dist.all_reduce(logits, dist.ReduceOp.MAX, group=self.layout.group)
        return logits


def generate(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    min_new_tokens: int = 0,
    layout: ParallelLayout = ALONE,
    kernel: str = "auto",
) -> list[list[int]]:
    """The likeliest next tokens of each prompt, without the stop token that ended them. The model's attention must be
    `CACHED`. Collective over the sp group.
    """
    reader, stops = Reader(loaded, layout, kernel), sorted(stop_ids)
    texts = [list(prompt) for prompt in prompts]
    ends: list[int | None] = [None] * len(texts)  # how long each is without its stop token
    logits = reader.read(texts, max_new_tokens)
    for i in range(max_new_tokens):
        if i < min_new_tokens:
            logits[:, stops] = -torch.inf
        tokens = logits.argmax(-1).tolist()
        for b, token in enumerate(tokens):
            if token in stops and ends[b] is None:
                ends[b] = len(texts[b])
            texts[b].append(token)
        if None not in ends or i + 1 == max_new_tokens:
            break
        outdated = any(cache_outdated(loaded.plain.config, len(text) - 1, len(text)) for text in texts)
        logits = reader.read(texts, max_new_tokens - i) if outdated else reader.add(tokens)
    return [text[len(prompt) : end] for text, prompt, end in zip(texts, prompts, ends, strict=True)]


def end_ids(loaded: Loaded, tokenizer: Any) -> set[int]:
    """Tokens that end an answer where the model is served: those of its tokenizer, config and generation config."""
    return set(stop_ids(tokenizer, loaded.plain.config, getattr(loaded.plain, "generation_config", None)))


def _tile_mlps(decoder: nn.Module) -> None:
    """Gated MLPs take a long prompt in tiles; again, it changes nothing."""
    for module in decoder.modules():
        is_gated = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
        if is_gated and not isinstance(module.forward, partial):
            module.forward = partial(_in_tiles, module.forward)


def _in_tiles(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x [1, s, D] -> [1, s, D]."""
    if x.dim() != 3 or x.shape[1] <= MLP_TILE_TOKENS:
        return forward(x)
    out = torch.empty_like(x)
    for into, part in zip(out.split(MLP_TILE_TOKENS, 1), x.split(MLP_TILE_TOKENS, 1), strict=True):
        into.copy_(forward(part))
    return out
