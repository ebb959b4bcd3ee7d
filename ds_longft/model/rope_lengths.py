"""RoPE types that choose their frequencies by the length of a text (`dynamic`, `longrope`), in packs and in shards.

transformers chooses once for a forward pass, by the largest position in it: in a pack that is the longest document's,
under sequence parallelism whatever a rank happens to hold, and `dynamic` also remembers earlier passes. Here every
document is rotated as a forward pass over it alone would rotate it, wherever it lies and however it is split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ds_longft.model.rope_formulas import rope_parts

LENGTH_DEPENDENT = ("dynamic", "longrope")


def length_dependent_layers(hf_config: PretrainedConfig) -> set[str | None]:
    """Layer types (None: all layers) whose frequencies depend on the length."""
    return {
        layer
        for layer, part in rope_parts(hf_config).items()
        if part["rope_type"] in LENGTH_DEPENDENT and not part.get("alpha")
    }


def cache_outdated(hf_config: PretrainedConfig, before_tokens: int, after_tokens: int) -> bool:
    """Whether a text that grows from one length to the other leaves the keys in its cache behind.

    `longrope` has two sets of frequencies, and keys of one do not go with queries of the other: transformers
    reads a text of Phi-3 anew at that length. With `dynamic` it keeps the keys, although each token changes them.
    """
    return any(
        before_tokens <= part["original_max_position_embeddings"] < after_tokens
        for part in rope_parts(hf_config).values()
        if part["rope_type"] == "longrope"
    )


def set_rope_lengths(model: nn.Module, lengths: Sequence[int], tokens: Sequence[int] | None = None) -> bool:
    """Rotate the tokens of the next forward passes by the lengths of the documents they are of.

    Call it before each forward pass. transformers' own choice is switched off for good on the first call. Free for
    models whose RoPE does not depend on the length. Returns whether the model's does. `model`: a decoder, or a model
    around one. `lengths` [N]: tokens of each document, whole. `tokens` [N]: how many of them are among the tokens of
    the pass, in order; None: all tokens are of one document.
    """
    hf_config = model.config
    assert isinstance(hf_config, PretrainedConfig)
    layers = length_dependent_layers(hf_config)
    if not layers:
        return False
    for rotary, layer_type, _ in rotary_modules(model, hf_config):
        if layer_type in layers:
            if not isinstance(rotary.forward, ByDocument):
                rotary.forward = ByDocument(rotary, hf_config)
            rotary.forward.lengths, rotary.forward.tokens = lengths, tokens
    return True


class ByDocument:
    """In place of a rotary module's forward pass: that same pass for the tokens of one document after another.

    The module's buffers hold what they held before it was called: the frequencies of short documents.
    """

    lengths: Sequence[int]  # [N] of the documents, whole
    tokens: Sequence[int] | None  # [N] of them in the pass; None: all of one

    def __init__(self, rotary: nn.Module, hf_config: PretrainedConfig) -> None:
        self._rotary, self._config = rotary, hf_config
        self._plain: Callable[..., Any] = rotary.forward
        self._layers = length_dependent_layers(hf_config)
        for layer_type in self._layers:
            # transformers updates the frequencies only if the module (not the config) names such a type
            if layer_type is None:
                rotary.rope_type = "default"  # type: ignore[assignment]
            else:
                cast(dict[str, str], rotary.rope_type)[layer_type] = "default"

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """What the module returns for hidden states x and position_ids [B, s]: cos and sin, [B, s, d] each."""
        keywords = {} if layer_type is None else {"layer_type": layer_type}
        if layer_type not in self._layers:
            return self._plain(x, position_ids, **keywords)
        name = _buffer(layer_type)
        loaded, frequencies = getattr(self._rotary, name), cache(partial(self.frequencies, layer_type))
        tokens = [position_ids.shape[1]] if self.tokens is None else self.tokens
        documents = [(count, length) for count, length in zip(tokens, self.lengths, strict=True) if count]
        pieces, start = [], 0
        for length, alike in groupby(documents, lambda d: self._standing_for(layer_type, d[1])):
            end = start + sum(count for count, _ in alike)
            setattr(self._rotary, name, frequencies(length))
            # The last position of such a document comes along, for modules that look at positions themselves (Phi-MoE).
            last = position_ids.new_full((len(position_ids), 1), length - 1)
            pieces.append(self._plain(x, torch.cat([position_ids[:, start:end], last], 1), **keywords))
            start = end
        setattr(self._rotary, name, loaded)
        assert start == position_ids.shape[1], f"documents of {start} tokens, positions {list(position_ids.shape)}"
        if isinstance(pieces[0], Tensor):  # cos and sin as one complex number
            return _joined(pieces)
        return tuple(_joined(parts) for parts in zip(*pieces, strict=True))

    def frequencies(self, layer_type: str | None, length: int) -> Tensor:
        """[d / 2] inverse frequencies of a document of that length, float32."""
        keywords = {} if layer_type is None else {"layer_type": layer_type}
        initialise = ROPE_INIT_FUNCTIONS[rope_parts(self._config)[layer_type]["rope_type"]]
        device = getattr(self._rotary, _buffer(layer_type)).device
        # A tensor, as transformers passes it: its arithmetic in float32 is part of what inference computes.
        return initialise(self._config.get_text_config(), device, seq_len=torch.tensor(length), **keywords)[0]

    def _standing_for(self, layer_type: str | None, length: int) -> int:
        """One length for all that have the same frequencies."""
        parameters = rope_parts(self._config)[layer_type]
        if parameters["rope_type"] == "dynamic":
            return max(length, self._config.get_text_config().max_position_embeddings)
        turn = int(parameters["original_max_position_embeddings"])
        return turn + (length > turn)


def rotary_modules(model: nn.Module, hf_config: PretrainedConfig) -> Iterator[tuple[nn.Module, str | None, str]]:
    """Every (module, layer type, attribute prefix) that holds inverse frequencies."""
    parts = rope_parts(hf_config)
    for module in model.modules():
        for layer_type in parts:
            prefix = "" if layer_type is None else f"{layer_type}_"
            if isinstance(getattr(module, f"{prefix}inv_freq", None), torch.Tensor):
                yield module, layer_type, prefix


def _buffer(layer_type: str | None) -> str:
    return "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces one behind the other, without the last position of each."""
    return torch.cat([piece[:, :-1] for piece in pieces], 1)
