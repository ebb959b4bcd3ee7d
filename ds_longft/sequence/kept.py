"""What a checkpointed layer's first call leaves for its second: on the GPU, in pinned host memory, or in files (which
of it: `decide/what_is_kept.py`).

Host copies go out on a stream of their own during the forward pass and come back on another during the backward pass,
those of the layer before already on their way while a layer is computed. At 131,072 tokens and sp 2 the gate and up
outputs of a Llama-8B layer are 3.5 GiB a GPU: 70 ms over PCIe, against 350 ms of backward pass.

All device tensors are allocated and freed on the compute stream, even those that copy streams fill; each is held by
name until its copy is over. So the allocator needs no events (`record_stream`) and no pool for each stream;
with a nearly full GPU those make it free cached blocks and wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future

import torch
from torch import Tensor

from ds_longft.sequence.disk import DiskStore
from ds_longft.sequence.pinned import pinned

Done = torch.cuda.Event | list[Future[None]] | None
"""When a copy is over: a GPU's event, transfers of a file, or at once (on a CPU)."""

LEAVING = 2
"""Calls whose device tensors may still be on their way out; compute waits for older ones."""


class Kept:
    """Tensors on the device, for one call of a layer and its recomputation.

    A layer may call what puts here more than once (DiffLlama has two attentions, Gemma 3n a linear that it calls
    twice): the output of the first call is kept, for the first call of the recomputation; the others are computed.
    `copy`: what follows may write into the tensors (liger's rotary embedding does, into q and k).
    """

    first_pass = True
    """Until the checkpoint of the layer says that its first pass is over."""

    def __init__(self, copy: bool = False) -> None:
        self.copy = copy
        self._value: tuple[Tensor, ...] | None = None
        self._home: torch.device | None = None  # of a value that was moved to the host

    @property
    def full(self) -> bool:
        """Whether something waits in it."""
        return self._value is not None

    def put(self, *tensors: Tensor) -> None:
        """Leave them for the recomputation, if they are the first of the first pass."""
        if self.first_pass and not self.full:
            self._leave(tensors)

    def take(self) -> tuple[Tensor, ...] | None:
        """What the first pass left, once; None in the first pass, and where it was given back."""
        return self._fetched() if self.full and not self.first_pass else None

    def _leave(self, tensors: tuple[Tensor, ...]) -> None:
        self._value = tuple(t.detach().clone() if self.copy else t.detach() for t in tensors)

    def _fetched(self) -> tuple[Tensor, ...] | None:
        value, self._value = self._value, None
        home, self._home = self._home, None
        return value if value is None or home is None else tuple(t.to(home) for t in value)

    @property
    def device_bytes(self) -> int:
        """What letting go of it would free on the device."""
        return sum(t.untyped_storage().nbytes() for t in self._value or () if self._home is None)

    def drop(self) -> int:
        """Give it back; returns the bytes. The recomputation computes it again, and no later call takes its place."""
        size, self._value, self.first_pass = self.device_bytes, None, False
        return size

    def move_out(self) -> None:
        """Move it to ordinary host memory until it is taken. Slow: for a GPU that is full."""
        value = self._value
        if self.device_bytes and value:
            if value[0].is_cuda:  # what failed may have been on another stream than the one that computes these
                torch.cuda.synchronize(value[0].device)
            self._home = value[0].device
            self._value = tuple(t.to("cpu", copy=True) for t in value)


def computed_once(kept: Kept | None, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What a first pass left in `kept`; else what `compute` returns, which is left there."""
    outputs = kept.take() if kept is not None else None
    if outputs is None:
        outputs = compute()
        if kept is not None:
            kept.put(*outputs)
    return outputs


class UnusedOutput(Kept):
    """For the last linears of a layer, whose outputs only feed the residual add: a recomputation needs no product.

    Keeps x A' (a few bytes a token) and gives outputs without content. `allowed` is set after the first pass,
    where nothing was seen to save the outputs of the last call (`recompute._ends_with`). Where there was more than one
    call, all are computed again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allowed = self.used = False
        self.calls = 0
        self.node: object = None  # the outputs' place in the autograd graph
        self._shapes: list[torch.Size] = []

    def put(self, *tensors: Tensor) -> None:
        """Keep only the last of (outputs, x A')."""
        self.calls += self.first_pass
        super().put(*tensors)

    def take(self) -> tuple[Tensor, ...] | None:
        """Outputs whose content is undefined and that take no memory, and x A'."""
        value = super().take()
        if value is None or not self.allowed or self.calls > 1:
            return None
        self.used = True
        return *(value[0].new_empty(()).expand(shape) for shape in self._shapes), *value

    def _leave(self, tensors: tuple[Tensor, ...]) -> None:
        *outs, xa = tensors
        self._value = (xa.detach(),)
        self._shapes = [out.shape for out in outs]


class HostStore:
    """Pinned host memory for kept tensors of one process, its two copy streams, and the order of what is out.

    Buffers are made on first use and kept: pinning costs about 0.4 s a GiB. `disk`: for what is not to lie in them.
    """

    def __init__(self, device: torch.device, disk: DiskStore | None = None) -> None:
        self.device, self.disk = device, disk
        gpu = device.type == "cuda"
        self.out = torch.cuda.Stream(device) if gpu else None
        self.back = torch.cuda.Stream(device) if gpu else None
        self.waiting: list[HostKept] = []  # in the order they went out
        self.leaving: list[tuple[HostKept, tuple[Tensor, ...]]] = []
        self._buffers: dict[Hashable, Tensor] = {}

    def slot(self, layer: int, name: Hashable, *, disk: bool = False) -> HostKept:
        """A place for the tensors of one call; used by one call of that layer at a time."""
        return DiskKept(self, layer, name) if disk else HostKept(self, layer, name)

    def prefetch(self, layer: int) -> None:
        """Start the copies back of what `layer` is about to ask for, and of the next layer before it that has any.

        What is still on its way out stays where it is: the last layers' outputs are asked for as soon as they left.
        """
        earlier = max((slot.layer for slot in self.waiting if slot.layer < layer), default=None)
        wanted = [slot for index in (layer, earlier) for slot in self.waiting if slot.layer == index]
        for slot, tensors in self.leaving:
            if slot in wanted:
                slot.stay(tensors)
        self.settle(0)
        for slot in wanted:
            slot.fetch()

    def settle(self, allowed: int) -> None:
        """Let go of device tensors that went out, but for the newest `allowed`; compute waits for their copies."""
        while len(self.leaving) > allowed:
            self.wait(self.leaving[0][0].done)
            del self.leaving[0]

    def wait(self, done: Done) -> None:
        """Have compute wait for a copy, and for a file the host too."""
        if isinstance(done, list):
            assert self.disk is not None
            self.disk.wait(done)
        elif done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)

    def buffer(self, key: Hashable, like: Tensor) -> Tensor:
        """Pinned memory shaped like `like`, reused between steps and grown where a pack is longer."""
        size = like.numel() * like.element_size()
        if not size:  # x A' of weights without an adapter; CUDA refuses to pin nothing
            return torch.empty_like(like, device="cpu")
        memory = self._buffers.get(key)
        if memory is None or memory.numel() < size:
            gpu = self.device.type == "cuda"
            memory = self._buffers[key] = pinned(size) if gpu else torch.empty(size, dtype=torch.uint8)
        return memory[:size].view(like.dtype).view(like.shape)


class HostKept(Kept):
    """Kept tensors that leave the device in between."""

    def __init__(self, store: HostStore, layer: int, name: Hashable) -> None:
        super().__init__()
        self.store, self.layer, self.name = store, layer, name
        self._host: tuple[Tensor, ...] | None = None
        self.done: Done = None

    @property
    def full(self) -> bool:
        """Whether something waits in it."""
        return self._host is not None

    def _leave(self, tensors: tuple[Tensor, ...]) -> None:
        """Start the copies to the host."""
        store = self.store
        contiguous = tuple(t.detach().contiguous() for t in tensors)
        self.done = self._out(contiguous)
        store.leaving.append((self, contiguous))
        store.settle(LEAVING)
        mine = (self.layer, self.name)
        same = next((i for i, other in enumerate(store.waiting) if (other.layer, other.name) == mine), None)
        if same is not None:  # left by a pass that had no backward
            del store.waiting[same:]
        store.waiting.append(self)

    def _fetched(self) -> tuple[Tensor, ...] | None:
        """The tensors on the device; compute waits for them if it has to."""
        self.fetch()
        self.store.wait(self.done)
        value, self._value, self._host = self._value, None, None
        self.store.waiting.remove(self)
        return value

    def stay(self, tensors: tuple[Tensor, ...]) -> None:
        """Take `tensors`, which are on their way out, for those that would come back."""
        self._value = tensors

    def fetch(self) -> None:
        """Start the copies back, if they have not been started."""
        if self._value is not None or self._host is None:
            return
        self._value = tuple(torch.empty_like(t, device=self.store.device) for t in self._host)  # the compute stream's
        self.done = self._back(self._value)

    def _out(self, tensors: tuple[Tensor, ...]) -> Done:
        self._host = tuple(self.store.buffer((self.layer, self.name, i), t) for i, t in enumerate(tensors))
        return _copy(tensors, self._host, self.store.out)

    def _back(self, values: tuple[Tensor, ...]) -> Done:
        assert self._host is not None
        if self.store.back is not None:
            assert isinstance(self.done, torch.cuda.Event)
            self.store.back.wait_event(self.done)  # out before back
        return _copy(self._host, values, self.store.back)


class DiskKept(HostKept):
    """Kept tensors that wait in a file."""

    def stay(self, tensors: tuple[Tensor, ...]) -> None:
        """And write no more of them."""
        assert self.store.disk is not None
        super().stay(tensors)
        self.done = self.store.disk.call_off((self.layer, self.name))

    def _out(self, tensors: tuple[Tensor, ...]) -> Done:
        assert self.store.disk is not None
        self._host = tuple(torch.empty_like(t, device="meta") for t in tensors)
        return self.store.disk.write((self.layer, self.name), tensors)

    def _back(self, values: tuple[Tensor, ...]) -> Done:
        assert self.store.disk is not None
        return self.store.disk.read((self.layer, self.name), values)


def _copy(
    sources: tuple[Tensor, ...], targets: tuple[Tensor, ...], stream: torch.cuda.Stream | None
) -> torch.cuda.Event | None:
    """Copy on `stream`, after what compute has been given so far; the event of its end, None without streams (CPU).

    After compute, because sources are its results, and targets may be memory that earlier kernels still use.
    """
    if stream is None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        return None
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source, non_blocking=True)
        return stream.record_event()
