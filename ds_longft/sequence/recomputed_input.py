"""The input of a layer's first linears, made again in the backward pass instead of being kept.

q, k and v read what the layer's norm made of the layer's input. LoRA's A (and W, in full training) needs that once
more for its gradient, so autograd keeps it through the backward pass of MLP and attention: 8 KiB a token in a Llama-8B,
where the whole working set was 61. The norm's own input is alive then anyway, and the norm runs once more: a read and a
write of 8 KiB a token, under 1 ms a layer at 131,072 tokens on an H200.

The norm's weight is then read outside of its module: under ZeRO-3 the layer has to gather it (`linear.gather_with`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RecomputedInput:
    """Remembers of each call of a norm what went in and what came out, until linears ask for it."""

    def __init__(self, norm: nn.Module) -> None:
        self._forward: Any = norm.forward
        self.weights = list(norm.parameters())
        self._last: tuple[Tensor, Tensor, int] | None = None  # input, output, version of the output
        norm.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        """The norm."""
        out: Tensor = self._forward(x)
        self._last = x, out, out._version
        return out

    def source_of(self, out: Tensor) -> Tensor | None:
        """The norm's input if its last output was `out`, or `out` with another graph, and nobody has written into it;
        asked once a call.

        DeepSpeed's ZeRO-3 detaches what modules return, so that it is another tensor of the same memory.
        """
        if self._last is None:
            return None
        (source, made, version), self._last = self._last, None
        return source if same_memory(made, out) and out._version == version else None

    def again(self, source: Tensor) -> Tensor:
        """What the norm made of `source`, without a graph."""
        with torch.no_grad():
            return self._forward(source)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one but for their graphs."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.shape == b.shape and a.stride() == b.stride()


def recompute_first_input(layer: nn.Module) -> RecomputedInput | None:
    """Remember the norm at the entrance of a decoder layer; None where the layer begins with something else."""
    norm = getattr(layer, "input_layernorm", None)
    return RecomputedInput(norm) if isinstance(norm, nn.Module) else None
