"""When a GPU is fuller than foreseen: what is kept only to save time is given back, and the step goes on.

Kept outputs of linears are computed again where they are missing, to the same bits. Which of them a rank keeps is its
own business: no collective depends on it. So the operation that found no memory is tried again at once, in the middle
of the step, and no other rank is asked. Then, within the host memory that a rank may use, attention outputs and layer
inputs leave the GPU. What was given back is not kept in later steps either.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_longft.sequence.kept import HostStore
from ds_longft.sequence.recompute import LayerKeep

TRIED_ONCE = ("c10d::", "aten::_foreach", "aten::_fused")
"""Operations that may have done a part of their work, or that other ranks take part in."""


class Relief(TorchDispatchMode):
    """Retries operations that run out of memory, giving back a layer's kept outputs before each retry.

    Raises what the operation raised when nothing is left to give.
    """

    def __init__(self, keeps: Sequence[LayerKeep], host_bytes: int, device: torch.device) -> None:
        super().__init__()
        self.keeps, self.host_bytes, self.device = keeps, host_bytes, device
        self.given_bytes = 0  # since they were last asked for
        self._store: HostStore | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            if func.name().startswith(TRIED_ONCE):
                raise
            failed = error.with_traceback(None)  # its frames would hold tensors
        for _ in self._reliefs():
            try:
                return func(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                failed = error.with_traceback(None)
        raise failed

    def _reliefs(self) -> Iterator[None]:
        """Everything that can free memory, one thing at a time; garbage last."""
        while self._give():
            yield
        gc.collect()
        yield

    def take_note(self) -> int:
        """Bytes given back since this was last asked."""
        given, self.given_bytes = self.given_bytes, 0
        return given

    def _give(self) -> int:
        """Free one layer's worth; returns the bytes, 0 when nothing is left."""
        freed = next((size for keep in self.keeps if (size := keep.give_linears())), 0)  # first layers last needed
        if not freed and self.host_bytes > 0:
            if self._store is None:
                self._store = HostStore(self.device)
            store = self._store
            moved = (keep.give_to_host(store, self.host_bytes) for keep in self.keeps)
            freed = next((size for size in moved if size), 0)
            self.host_bytes -= freed
        self.given_bytes += freed
        return freed
