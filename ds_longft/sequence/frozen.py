"""Frozen weights of decoder layers, kept away from the GPU's compute and brought a layer ahead of it.

Between its calls a layer has no weights, only their shapes. When it is called, forward, again or in a pass without
gradient, its bytes lie in one of two slots on the device, and those of the layer that comes next are on their way into
the other one, on a stream of its own: the host waits for nothing. A layer's backward pass follows its recomputation, so
it finds them there. Which layer comes next is learned: what followed this one, after the one before it, the last time.

Where the bytes wait is a home's business: `HostHome`, one copy a node; `ShardHome`, a share on each rank. What the
tensors mean is nobody's here: parameters that are not trained and buffers that are saved, packed ones too.

Without recomputation the backward pass would read weights that are gone. Autograd finds that: a slot counts what is
written into it as a change of the tensors that were in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_longft.sequence.pinned import Pages

ALIGNED_BYTES = 256
"""Each tensor begins at a multiple of this: fast kernels want it, and any element type can be read there."""

HEAD_ELEMENTS = 4
"""How many first elements of each weight stay readable: the fingerprint of a base is made of them
(`train.weights.start_fingerprint`)."""

POISON = 0xFF
"""On CPUs a slot is filled with it before another layer comes: NaN in every float type."""


class Part(NamedTuple):
    """A frozen tensor of a layer."""

    path: str  # of its module in the layer
    name: str
    parameter: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int  # byte in the layer's

    @property
    def stop(self) -> int:
        """The byte behind its last one."""
        return self.start + torch.Size(self.shape).numel() * self.dtype.itemsize

    def seen_in(self, memory: Tensor) -> Tensor:
        """The tensor as it lies in a layer's bytes: a view."""
        return memory[self.start : self.stop].view(self.dtype).view(self.shape)


def parts_of(layer: nn.Module, trained: Iterable[str] = ()) -> list[Part]:
    """What of a layer never changes: its parameters, and its buffers that are saved.

    `trained`: names of modules that PEFT makes a trained copy of; they stay where they are.
    """
    parts, start, out = [], 0, set(trained)
    for path, module in layer.named_modules():
        if out.intersection(path.split(".")):
            continue
        of_module = [(n, p, True) for n, p in module._parameters.items()]
        of_module += [(n, b, False) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set]
        for name, tensor, parameter in of_module:
            if tensor is not None:
                parts.append(Part(path, name, parameter, tuple(tensor.shape), tensor.dtype, start))
                start = -(-parts[-1].stop // ALIGNED_BYTES) * ALIGNED_BYTES
    return parts


def _holder(module: nn.Module, part: Part) -> dict[str, Any]:
    return cast(dict[str, Any], module._parameters if part.parameter else module._buffers)


def size_of(parts: Sequence[Part]) -> int:
    """Bytes of a layer."""
    return -(-parts[-1].stop // ALIGNED_BYTES) * ALIGNED_BYTES if parts else 0


class HostHome:
    """Layers' bytes in host memory, one copy for the ranks of a node, pinned on GPUs. A slot needs `room` bytes.

    Memory without a file, mapped by each of these ranks: /dev/shm is 64 MiB in many containers.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device, local_world: int) -> None:
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.spans, self.room, self.device = list(pairwise(ends)), max(sizes), device
        first = dist.get_rank() - dist.get_rank() % local_world
        self.writes = dist.get_rank() == first
        if local_world == 1:
            self.pages = Pages.of(ends[-1])
            self.memory = self.pages.tensor()
            return
        file = os.memfd_create("frozen weights") if self.writes else -1
        if self.writes:
            os.ftruncate(file, ends[-1])
        paths: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(paths, f"/proc/{os.getpid()}/fd/{file}")
        mapped = os.open(paths[first], os.O_RDWR)
        self.pages = Pages(mapped, ends[-1])
        self.memory = self.pages.tensor()
        os.close(mapped)
        dist.barrier()  # every rank has opened it
        if self.writes:
            os.close(file)

    def put(self, layer: int, memory: Tensor) -> None:
        """Keep a layer's bytes [n] uint8 on the device: every rank is given all of them, in the same order."""
        if self.writes:
            self.memory[slice(*self.spans[layer])].copy_(memory)

    def ready(self) -> None:
        """Every layer is there. Collective. Pinned only now: the pages are there."""
        dist.barrier()
        if self.device.type == "cuda":
            self.pages.pin()

    def fetch(self, layer: int, slot: Tensor) -> None:
        """Bring them into `slot` [at least `room`] uint8, on the current stream."""
        start, stop = self.spans[layer]
        slot[: stop - start].copy_(self.memory[start:stop], non_blocking=True)


class ShardHome:
    """A share of each layer on each rank's device, gathered through a process group of its own: its collectives run
    beside those of the sequence-parallel group, in the same order on every rank.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        unit = ALIGNED_BYTES * self.world
        self.shares = [-(-size // unit) * ALIGNED_BYTES for size in sizes]
        self.room = max(self.shares) * self.world
        self.group = dist.new_group()
        self.own: dict[int, Tensor] = {}

    def put(self, layer: int, memory: Tensor) -> None:
        """As `HostHome.put`."""
        share = self.shares[layer]
        own = memory[self.rank * share : (self.rank + 1) * share]
        self.own[layer] = memory.new_zeros(share)
        self.own[layer][: len(own)] = own

    def ready(self) -> None:
        """Every layer is there."""

    def fetch(self, layer: int, slot: Tensor) -> None:
        """As `HostHome.fetch`. Every rank's share [n / world] -> slot [n]."""
        own = self.own[layer]
        dist.all_gather_into_tensor(slot[: len(own) * self.world], own, group=self.group)


Home = HostHome | ShardHome


@dataclass
class Slot:
    """Memory on the device for one layer."""

    memory: Tensor  # [room] uint8
    layer: int | None = None  # whose bytes it holds, or is about to
    here: torch.cuda.Event | None = None  # from then on
    tensors: dict[int, list[Tensor]] = field(default_factory=dict)  # of each layer, as they lie in this slot


class FrozenLayers:
    """The frozen tensors of a model's decoder layers: put in place just before a layer runs."""

    def __init__(
        self, layers: Sequence[nn.Module], parts: Sequence[list[Part]], home: Home, device: torch.device
    ) -> None:
        self.home, self.device, self.parts = home, device, list(parts)
        self.modules = [
            [layer.get_submodule(part.path) for part in of] for layer, of in zip(layers, parts, strict=True)
        ]
        self.away: list[list[Tensor]] = []  # of each layer what stands for its tensors: a shape that costs nothing
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slots: list[Slot] = []
        self.followed: dict[tuple[int | None, int, bool, bool], int] = {}
        self.now: tuple[int | None, int, bool, bool] | None = None  # the newest call: before it, it, which pass
        self.fetches = self.late = 0  # layers brought, and those that were not on their way when they were called

    def put(self, index: int, memory: Tensor) -> None:
        """Hand over a layer's bytes [n] uint8; from now on it is without weights. Layers come in order."""
        assert index == len(self.away), "layers are put in order"
        self.home.put(index, memory)
        self.away.append([self._stand_in(part, memory) for part in self.parts[index]])
        self._place(index, self.away[index])

    def install(self, layers: Sequence[nn.Module]) -> None:
        """From now on a call of one of these layers brings its weights. Before recomputation is put around them."""
        self.slots = [Slot(torch.empty(self.home.room, dtype=torch.uint8, device=self.device)) for _ in range(2)]
        for i, layer in enumerate(layers):
            layer.forward = partial(self._call, i, layer.forward)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, modules have none of these tensors: DeepSpeed finds none to cast, broadcast or partition."""
        before = [
            (m, dict(m._parameters), dict(m._buffers)) for of in self.modules for m in {id(x): x for x in of}.values()
        ]
        for parts, modules in zip(self.parts, self.modules, strict=True):
            for part, module in zip(parts, modules, strict=True):
                _holder(module, part)[part.name] = None
        try:
            yield
        finally:
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def _call(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._enter(index)
        return forward(*args, **kwargs)

    def _enter(self, index: int) -> None:
        """Bring a layer's tensors, and send for those of the one that comes next."""
        before = self.now[1] if self.now is not None else None
        if self.now is not None:
            self.followed[self.now] = index
        backward = torch._C._current_graph_task_id() != -1
        self.now = before, index, backward, torch.is_grad_enabled()
        slot = next((slot for slot in self.slots if slot.layer == index), None)
        if slot is None:  # any slot is free: what an earlier layer had to do is done, or waits for nothing but compute
            self.late += 1
            slot = next(slot for slot in self.slots if slot.layer != before or before is None)
            self._fetch(index, slot)
        if slot.here is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.here)
        if index not in slot.tensors:
            slot.tensors[index] = [self._seen(part, slot.memory) for part in self.parts[index]]
        self._place(index, slot.tensors[index])
        following = self.followed.get(self.now, index - 1 if backward else index + 1)
        if 0 <= following < len(self.parts) and all(other.layer != following for other in self.slots):
            self._fetch(following, next(other for other in self.slots if other is not slot))

    def _fetch(self, index: int, slot: Slot) -> None:
        """Start the copy of a layer into a slot, behind the compute that has been given so far: it may still read the
        layer that is there.
        """
        self.fetches += 1
        if slot.layer is not None:
            self._place(slot.layer, self.away[slot.layer])
        slot.layer = index
        slot.memory[:0].zero_()  # counts as a change, whatever brings the bytes
        if self.stream is None:
            slot.memory.fill_(POISON)
            self.home.fetch(index, slot.memory)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.home.fetch(index, slot.memory)
            slot.here = self.stream.record_event()

    def _place(self, index: int, tensors: Sequence[Tensor]) -> None:
        for part, module, tensor in zip(self.parts[index], self.modules[index], tensors, strict=True):
            _holder(module, part)[part.name] = tensor

    def _seen(self, part: Part, memory: Tensor) -> Tensor:
        tensor = part.seen_in(memory)
        return nn.Parameter(tensor, requires_grad=False) if part.parameter else tensor

    def _stand_in(self, part: Part, memory: Tensor) -> Tensor:
        """One element, poison, seen in the part's shape; `head`: its first elements, on the host."""
        poison = torch.full((part.dtype.itemsize,), POISON, dtype=torch.uint8, device=self.device).view(part.dtype)
        tensor: Any = poison.expand(part.shape) if part.shape else poison.view(())
        if part.parameter:
            tensor = nn.Parameter(tensor, requires_grad=False)
        tensor.head = part.seen_in(memory).reshape(-1)[:HEAD_ELEMENTS].to("cpu")
        return tensor
