"""Activation checkpointing: which decoder layers keep what for the backward pass, and where.

| policy | kept per token | forward passes of a layer |
|---|---|---|
| none | everything | 1 |
| keep_attention | layer inputs, attention outputs | 2, attention 1 |
| auto | as keep_attention, and outputs of as many linears as fit | 2, attention and kept linears 1 |
| full | layer inputs | 2 |
| every_k | every k-th layer input, k layer inputs of one segment | 3, the last layer of a segment 2 |
| sqrt | as every_k with k = sqrt(layers): the least memory | as every_k |

On GPUs `auto` may already have been replaced by another policy (`decide/decisions.py`). Which linears fit, and where
their outputs wait: `decide/what_is_kept.py`.
Whatever is kept may lie in host memory instead (`LayerKeep`). The down projection runs forward once in all of them
where its output only feeds the residual add.
Segments are nested: inside one, each layer is checkpointed again. Without that, a segment of k layers would keep all of
their inner activations at once, about 25 layer inputs each, more than checkpointing every layer does.
Source of the rule: Chen et al., arXiv 1604.06174; of keeping attention: DISTFLASHATTN, arXiv 2310.03294.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_longft.errors import ModelError
from ds_longft.sequence.experts import Experts
from ds_longft.sequence.kept import HostStore, Kept, UnusedOutput
from ds_longft.sequence.linear import LinearGroup
from ds_longft.sequence.mlp import TiledMlp
from ds_longft.sequence.recomputed_input import same_memory

Forward = Callable[..., Any]
Place = Literal["device", "host", "disk", "nowhere"]
Holder = LinearGroup | TiledMlp | Experts


@dataclass
class LayerKeep:
    """What is kept of one layer, and where; may be changed between steps."""

    index: int
    on_device: list[LinearGroup] = field(default_factory=list)
    on_host: list[LinearGroup] = field(default_factory=list)
    store: HostStore | None = None  # whatever goes to the host
    attention: Place = "device"
    input: Place = "device"
    last: Holder | None = None  # what the layer ends with: its output is not computed again, unless something saves it
    # slots of the newest call on the device: of linears, which may be given back; of attention output and layer input
    waiting: list[tuple[LinearGroup, Kept]] = field(default_factory=list)
    outputs: list[Kept] = field(default_factory=list)

    def slots(self) -> list[tuple[Holder, Kept]]:
        """A new slot for each group of one call: nothing stale can be taken."""
        self.waiting = [(group, group.slot()) for group in self.on_device]
        slots: list[tuple[Holder, Kept]] = [*self.waiting]
        if self.store is not None:
            slots += [(group, self.store.slot(self.index, group.names)) for group in self.on_host]
        return slots

    def last_slot(self, unused: UnusedOutput) -> list[tuple[Holder, Kept]]:
        """`unused` for what the layer ends with, if that is known."""
        return [(self.last, unused)] if self.last is not None else []

    def slot(self, name: Literal["attention", "input"]) -> Kept | None:
        """Where the attention's output or the layer's input waits; None: it is computed again."""
        place: Place = getattr(self, name)
        if place == "nowhere":
            return None
        if place == "device":
            self.outputs.append(Kept())
            return self.outputs[-1]
        assert self.store is not None, f"layer {self.index}: no host memory for its {name}"
        return self.store.slot(self.index, name, disk=place == "disk")

    def give_linears(self) -> int:
        """Let go of the linears' outputs that wait on the device, now and in later calls; returns the bytes."""
        freed = 0
        for group, slot in self.waiting:
            if size := slot.drop():
                freed += size
                self.on_device = [g for g in self.on_device if g is not group]
        return freed

    def give_to_host(self, store: HostStore, most: int) -> int:
        """Move attention output and layer input to the host, now and in later calls, if they are at most `most` bytes;
        returns the bytes.
        """
        size = sum(slot.device_bytes for slot in self.outputs)
        if not 0 < size <= most:
            return 0
        for slot in self.outputs:
            slot.move_out()
        self.store = self.store or store
        self.attention = "host" if self.attention == "device" else self.attention
        self.input = "host" if self.input == "device" else self.input
        return size


def apply_recompute(
    layers: Sequence[nn.Module], policy: str, *, every: int = 2, keep: Sequence[LayerKeep] | None = None
) -> None:
    """Replace the forward of decoder layers by one that recomputes.

    Layers take hidden states [1, s, D] first and return them. The random state is saved and restored for
    recomputation: not LoRA's dropout alone draws from it, models have their own (Phi-2), and noise on routers. `keep`:
    what of each layer is kept where; read at each call. Attention is kept by `keep_attention` and `auto` only.
    """
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=True)
    keeps: Sequence[LayerKeep] = keep or [LayerKeep(i) for i in range(len(layers))]
    if policy == "none":
        return
    if policy not in ("keep_attention", "auto"):
        for each in keeps:
            each.attention = "nowhere"
    if policy in ("every_k", "sqrt"):
        size = every if policy == "every_k" else max(1, round(math.sqrt(len(layers))))
        for start in range(0, len(layers), size):
            _Segment(list(layers[start : start + size]), list(keeps[start : start + size]), run)
        return
    for layer, kept in zip(layers, keeps, strict=True):
        layer.forward = partial(_checkpointed, run, layer.forward, kept)


def _checkpointed(
    run: Forward, forward: Forward, keep: LayerKeep, hidden: Tensor, *args: Any, inner: bool = False, **kwargs: Any
) -> Any:
    """Checkpoint one call of a layer; what `keep` names is computed once. `inner`: inside of another checkpoint."""
    if not torch.is_grad_enabled():
        return forward(hidden, *args, **kwargs)
    unused = UnusedOutput()
    keep.outputs = []
    attention = keep.slot("attention")
    if attention is not None:
        kwargs["kept"] = attention
    slots = [*keep.slots(), *keep.last_slot(unused)]
    layer = partial(_with_slots, forward, slots, unused)
    # Inside, torch saves its arguments by the hooks of the segment around it: they are recomputed too.
    out = run(layer, hidden, *args, **kwargs) if inner else _from(run, layer, keep, hidden, *args, **kwargs)
    for slot in (attention, *(slot for _, slot in slots)):
        if slot is not None:
            slot.first_pass = False
    unused.allowed = _ends_with(out, unused.node)
    return out


def _with_slots(
    forward: Forward, slots: Sequence[tuple[Holder, Kept]], unused: UnusedOutput, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Call a layer that puts into these slots, or takes from them what an earlier call has put there."""
    for holder, slot in slots:
        holder.kept = slot
    try:
        out = forward(x, *args, **kwargs)
    finally:
        for holder, _ in slots:
            holder.kept = None
    assert not unused.used, "the recomputation went on after the output that nothing should read"
    return out


def _from(run: Forward, layer: Forward, keep: LayerKeep, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint `layer(hidden, ...)`, its input waiting where `keep` says.

    Not among the arguments of the checkpointed call: torch keeps those. An empty tensor is: torch restores the random
    state of its arguments' device only, and dropout must draw the same mask again.
    """
    first, needs_grad, source = [hidden], hidden.requires_grad, keep.slot("input")
    assert source is not None, "a layer's input is always kept"

    def call(_: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first:
            return layer(first.pop(), *args, **kwargs)
        if keep.store is not None:
            keep.store.prefetch(keep.index)
        taken = source.take()
        assert taken is not None, "a layer's input was asked for twice"
        return layer(taken[0].requires_grad_(needs_grad), *args, **kwargs)

    out = run(call, hidden.new_empty(0), *args, **kwargs)
    source.put(hidden)
    source.first_pass = False
    return out


def _ends_with(out: Any, node: object) -> bool:
    """Whether a layer's output is a sum of the output of `node` and other terms, and nothing else reads that output or
    a partial sum with it: no one saves what is added.

    A layer of two sublayers ends with such a sum too, but its second norm reads the first sublayer's (LongCat-Flash).
    """
    tensor = out[0] if isinstance(out, tuple) else out
    added: Any = tensor.grad_fn
    made: Any = node
    if made is None or added is None or added.name() != "AddBackward0":
        return False
    # Whatever reads the output of `node` is younger than it.
    readers, found = Counter[Any](), [added]
    for reader in found:
        for term, _ in reader.next_functions:
            if term is not None and term._sequence_nr() >= made._sequence_nr():
                found += [term] if term not in readers else []
                readers[term] += 1
    return _adds(added, made, readers)


def _adds(made_by: Any, node: Any, readers: Mapping[Any, int]) -> bool:
    """Whether `node` is a term of this sum, itself or seen in another shape, read nowhere else on the way."""
    if made_by is node:
        return True
    if made_by.name() != "AddBackward0" and not made_by.name().startswith(_NOTHING_KEPT):
        return False
    terms = made_by.next_functions if made_by.name() == "AddBackward0" else made_by.next_functions[:1]
    return any(readers.get(term) == 1 and _adds(term, node, readers) for term, _ in terms)


_NOTHING_KEPT = ("PreBackwardFunction", "PostBackwardFunction", "ViewBackward", "UnsafeViewBackward")
"""DeepSpeed's ZeRO-3 wraps the outputs and inputs of modules in the first two; none of them keeps a tensor."""


class _Segment:
    """Runs consecutive layers as one checkpoint without touching the model's own loop over them.

    The model calls its layers one by one; all but the last of a segment only note their arguments and hand the hidden
    states on, the last one then runs the whole segment. So nothing may be computed between layers: it would be of
    hidden states that no layer has seen. In the segment's recomputation every layer but the last is
    checkpointed again; the last one's backward pass comes first, so its tensors are kept at once.
    """

    def __init__(self, layers: list[nn.Module], keeps: list[LayerKeep], run: Forward) -> None:
        self.run, self.keeps = run, keeps
        self.forwards: list[Forward] = [layer.forward for layer in layers]
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.noted: tuple[Tensor, int] | None = None  # the hidden states that were handed on, and their version
        for layer in layers[:-1]:
            layer.forward = self._note
        layers[-1].forward = self._run_all

    def _note(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check(hidden)
        self.noted = hidden, hidden._version
        self.calls.append((args, kwargs))
        return hidden

    def _check(self, hidden: Tensor) -> None:
        """See that the model hands on what it got; ZeRO-3 makes other tensors of the same memory of it."""
        noted, self.noted = self.noted, None
        if noted is None or (same_memory(noted[0], hidden) and hidden._version == noted[1]):
            return
        self.calls = []
        raise ModelError(
            "the model computes something between its decoder layers, which recomputation in segments would skip: set "
            "train.recompute to full or keep_attention"
        )

    def _run_all(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._check(hidden)
        calls = [*self.calls, (args, kwargs)]
        self.calls = []
        *inner, last = zip(self.forwards, self.keeps, calls, strict=True)
        unused = UnusedOutput()
        slots = self.keeps[-1].last_slot(unused) if torch.is_grad_enabled() else []

        def segment(x: Tensor) -> Any:
            for forward, keep, (more, named) in inner:
                x = _checkpointed(self.run, forward, keep, x, *more, inner=True, **named)
            forward, _, (more, named) = last
            return _with_slots(forward, slots, unused, x, *more, **named)

        if not torch.is_grad_enabled():
            return segment(hidden)
        self.keeps[0].outputs = []
        out = _from(self.run, segment, self.keeps[0], hidden)
        unused.first_pass = False
        unused.allowed = _ends_with(out, unused.node)
        return out
