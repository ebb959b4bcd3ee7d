"""Activation checkpointing: which decoder layers keep what for the backward pass.

| policy | kept per token | forward passes of a layer |
|---|---|---|
| none | everything | 1 |
| keep_attention | layer inputs, attention outputs | 2, attention 1 |
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
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_longft.sequence.attention import KeptAttention

Forward = Callable[..., Any]


def apply_recompute(layers: Sequence[nn.Module], policy: str, *, every: int = 2, dropout: bool = False) -> None:
    """Replace the forward of decoder layers by one that recomputes.

    Layers take hidden states [1, s, D] first and return them. `dropout`: the
    random state is saved and restored for recomputation (needed only where something in a layer draws random numbers).
    """
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout)
    if policy == "none":
        return
    if policy in ("full", "keep_attention"):
        call = partial(_keeping, run) if policy == "keep_attention" else run
        for layer in layers:
            layer.forward = partial(call, layer.forward)
        return
    size = every if policy == "every_k" else max(1, round(math.sqrt(len(layers))))
    for start in range(0, len(layers), size):
        _Segment(list(layers[start : start + size]), run)


def _keeping(run: Callable[..., Any], forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint one call of a layer; its attention, called twice with the same `kept`, computes once."""
    return run(forward, *args, **kwargs, kept=KeptAttention())


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
