"""Which module of which family carries a state, and how its forward is replaced on a model.

One line a class. Model types that are not in `config/state_families.py` are refused before a model is loaded
(`model/supported.py`), a class of theirs that is not here when it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ds_longft.config.state_families import STATE_FAMILIES, STATE_LAYERS
from ds_longft.errors import ModelError
from ds_longft.sequence.linear import gather_with
from ds_longft.sequence.state import mixers
from ds_longft.sequence.state.spread import NextTokens, Spread, weights_of

Mixer = Callable[[Any, Tensor, Spread], Any]

MIXERS: dict[str, Mixer] = {
    "Qwen3NextGatedDeltaNet": mixers.gated_delta_net,
    "Qwen3_5GatedDeltaNet": mixers.gated_delta_net,
    "Qwen3_5MoeGatedDeltaNet": mixers.gated_delta_net,
    "OlmoHybridGatedDeltaNet": mixers.gated_delta_net,
    "KimiLinearDeltaAttention": mixers.kimi_delta_attention,
    "NemotronHMamba2Mixer": mixers.mamba2,
    "GraniteMoeHybridMambaLayer": mixers.mamba2,
    "BambaMixer": mixers.mamba2,
    "FalconH1Mixer": mixers.mamba2,
    "JambaMambaMixer": mixers.mamba1,
    "Lfm2ShortConv": mixers.short_convolution,
    "Lfm2MoeShortConv": mixers.short_convolution,
    "MiniMaxLightningAttention": mixers.lightning_attention,
}
"""Class of the module -> its forward here."""


def state_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(decoder layer, its module that carries a state) of every such layer."""
    for parent in model.modules():
        for child in parent.children():
            if type(child).__name__ in MIXERS:
                yield parent, child


def spread_state_layers(model: nn.Module) -> int:
    """Replace the forward of a model's layers with a state; returns how many. Again, it changes nothing.
    Raises ModelError: the config names more such layers than there are modules known here. Their states would end at
    each rank's own tokens.
    """
    count = 0
    for layer, mixer in state_layers(model):
        count += 1
        if isinstance(mixer.forward, partial):
            continue
        noted: dict[str, Any] = {}  # for mixers that the layer does not hand on to what it is called with (Jamba)
        layer.forward = partial(_noting, layer.forward, noted)
        mixer.forward = partial(_spread_forward, mixer, MIXERS[type(mixer).__name__], noted)
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    named = sum(kind in STATE_LAYERS for kind in kinds) if getattr(text, "model_type", "") in STATE_FAMILIES else count
    if count != named:
        raise ModelError(
            f"{count} of {named} layers with a state of {type(model).__name__} are of a class known here: this version "
            "of transformers builds them in another way; install one that the README names"
        )
    return count


def gather_state_layers(model: nn.Module) -> None:
    """Under ZeRO-3: gather what a mixer's forward reads of modules that it does not call, with the mixer."""
    for _, mixer in state_layers(model):
        norms = [getattr(mixer, name) for name in ("norm", "o_norm") if hasattr(mixer, name)]
        read = [*weights_of(mixer), *(weight for norm in norms for weight in norm.parameters())]
        own = {id(weight) for weight in mixer.parameters(recurse=False)}
        gather_with(mixer, [weight for weight in read if id(weight) not in own])


def _noting(forward: Callable[..., Any], noted: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's forward. Inside of a checkpoint, so that the recomputation gets the same documents."""
    noted.update(kwargs)
    try:
        return forward(*args, **kwargs)
    finally:
        noted.clear()


def _spread_forward(
    mixer: nn.Module, spread: Mixer, noted: dict[str, Any], hidden_states: Tensor, *_: Any, **__: Any
) -> Any:
    """The mixer's forward: hidden_states [1, s, D], or [1, B, D] of the next token of each of B texts.
    Raises ModelError: no documents, and no states of texts to go on from: each rank's state would start anew.
    """
    documents, layout, states = (noted.get(name) for name in ("documents", "layout", "states"))
    if hidden_states.shape[0] != 1:
        raise ModelError(f"{type(mixer).__name__} got a batch of several rows: lay them into one pack")
    carried = None if states is None else states.of(mixer)
    if documents is not None and layout is not None:
        few = noted.get("kv_heads_at_a_time") is not None
        return spread(mixer, hidden_states, Spread.of(documents, layout, carried, few))
    if states is None:
        raise ModelError(
            f"{type(mixer).__name__} was called without `documents` and `layout`: its state would run on from one "
            "document into the next"
        )
    return spread(mixer, hidden_states, NextTokens.of(states.documents, states.layout, carried))
