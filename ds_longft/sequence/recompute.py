"""Activation checkpointing: which decoder layers keep what for the backward pass.

| policy | kept per token | forward passes of a layer |
|---|---|---|
| none | everything | 1 |
| keep_attention | layer inputs, attention outputs | 2, attention 1 |
| auto | as keep_attention, and outputs of as many linears as fit | 2, attention and kept linears 1 |
| full | layer inputs | 2 |
| every_k | every k-th layer input, k layer inputs of one segment | 3 |
| sqrt | as every_k with k = sqrt(layers): the least memory | 3 |

Segments are nested: inside one, each layer is checkpointed again. Without that, a segment of k layers would keep all of
their inner activations at once, about 25 layer inputs each, more than checkpointing every layer does.
Source of the rule: Chen et al., arXiv 1604.06174; of keeping attention: DISTFLASHATTN, arXiv 2310.03294.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_longft.sequence.kept import HostStore, Kept
from ds_longft.sequence.linear import LinearGroup

Forward = Callable[..., Any]


@dataclass
class LayerKeep:
    """What is kept of one layer beside its input and its attention; may be changed between steps."""

    index: int
    on_device: list[LinearGroup] = field(default_factory=list)
    on_host: list[LinearGroup] = field(default_factory=list)
    store: HostStore | None = None  # where `on_host` goes

    def slots(self) -> list[tuple[LinearGroup, Kept]]:
        """A new slot for each group of one call: nothing stale can be taken."""
        slots = [(group, group.slot()) for group in self.on_device]
        if self.store is not None:
            slots += [(group, self.store.slot((self.index, group.names))) for group in self.on_host]
        return slots


def apply_recompute(
    layers: Sequence[nn.Module],
    policy: str,
    *,
    every: int = 2,
    dropout: bool = False,
    keep: Sequence[LayerKeep] | None = None,
) -> None:
    """Replace the forward of decoder layers by one that recomputes.

    Layers take hidden states [1, s, D] first and return them. `dropout`: the random state is saved and restored for
    recomputation (needed only where something in a layer draws random numbers). `keep`: for `keep_attention` and
    `auto`, what else of each layer is kept; read at each call.
    """
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout)
    if policy == "none":
        return
    if policy in ("every_k", "sqrt"):
        size = every if policy == "every_k" else max(1, round(math.sqrt(len(layers))))
        for start in range(0, len(layers), size):
            _Segment(list(layers[start : start + size]), run)
        return
    keeps: Sequence[LayerKeep | None] = keep or [None] * len(layers)
    for layer, kept in zip(layers, keeps, strict=True):
        layer.forward = partial(run, layer.forward) if policy == "full" else partial(_keeping, run, layer.forward, kept)


def _keeping(run: Callable[..., Any], forward: Forward, keep: LayerKeep | None, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint one call of a layer, with its attention and the linears of `keep` computed once."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    slots = keep.slots() if keep is not None else []

    def layer(*args: Any, **kwargs: Any) -> Any:
        for group, slot in slots:
            group.kept = slot
        try:
            return forward(*args, **kwargs)
        finally:
            for group, _ in slots:
                group.kept = None

    return run(layer, *args, **kwargs, kept=Kept())


class _Segment:
    """Runs consecutive layers as one checkpoint without touching the model's own loop over them.

    The model calls its layers one by one; all but the last of a segment only note their arguments and hand the hidden
    states on, the last one then runs the whole segment.
    """

    def __init__(self, layers: list[nn.Module], run: Callable[..., Any]) -> None:
        self.run = run
        self.forwards: list[Forward] = [layer.forward for layer in layers]
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        for layer in layers[:-1]:
            layer.forward = self._note
        layers[-1].forward = self._run_all

    def _note(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return hidden

    def _run_all(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls = [*self.calls, (args, kwargs)]
        self.calls = []

        def segment(x: Tensor) -> Any:
            for forward, (more, named) in zip(self.forwards, calls, strict=True):
                x = self.run(forward, x, *more, **named)
            return x

        return self.run(segment, hidden)
