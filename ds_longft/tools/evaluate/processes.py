"""The processes of one evaluation, one a GPU: started here where no launcher has, and the same code for one alone.

Every process prepares the same work and does its share of it; rank 0 writes. A rank that cannot go on ends with its
exit code, and the process that started the ranks ends the others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from ds_longft.errors import ConfigError, LongftError
from ds_longft.layout import ParallelLayout
from ds_longft.ranks.join import Agreement, Launch

SAID_WITHIN_S = 60.0
"""Longest that a rank waits for another to have said what went wrong."""

Item = TypeVar("Item")
Made = TypeVar("Made")


class SaidOnce:
    """An error ends a rank, and then whoever started the ranks ends all. Often every rank has the same one at almost
    the same time: the first of them says it, and the others stay until it is said. Collective.
    """

    def __init__(self, rank: int, broadcast: Callable[[Any], Any]) -> None:
        """`broadcast`: gives rank 0's value on every rank."""
        import torch.distributed as dist

        host, self.rank = os.environ["MASTER_ADDR"], rank
        served = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        port = broadcast(served.port if served is not None else None)
        self.store = served or dist.TCPStore(host, port, is_master=False, wait_for_workers=False)

    def end(self, error: LongftError) -> NoReturn:
        """End this process. On rank 0 the error is raised, which the command line shows and ends with."""
        try:
            if self.store.add("failed", 1) == 1:
                if self.rank == 0:
                    raise error
                print(f"rank {self.rank}: {error}", file=sys.stderr, flush=True)
                self.store.set("said", "")
            else:
                self.store.wait(["said"], timedelta(seconds=SAID_WITHIN_S))
        except RuntimeError:  # rank 0, which keeps the store, has said it and is gone
            pass
        os._exit(error.exit_code)


class Processes:
    """This process among those of the evaluation; `sp` of them, side by side, work on one text."""

    def __init__(self, sp: int = 1) -> None:
        self.launch = Launch.from_environment()
        self._agreement: Agreement | None = None
        self._said: SaidOnce | None = None
        self.layout = ParallelLayout(1, 0, 1)
        if self.launch.world % sp:
            raise ConfigError(f"--sp is {sp}, which does not divide the {self.launch.world} ranks of this launch")
        if self.launch.world > 1:
            self.join()
            self.layout = ParallelLayout.create(sp)
            return
        from ds_longft.tools.evaluate.subject import one_device

        self.device = one_device()

    def join(self) -> None:
        """Join the others; one alone does so too where its weights are streamed. Again, it does nothing."""
        if self._agreement is not None:
            return
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.launch.local_world)))
        from ds_longft.ranks.join import join

        self.device, self._agreement = join(self.launch)
        if self.launch.world > 1:
            self._said = SaidOnce(self.launch.rank, self._agreement.broadcast)

    @classmethod
    @contextmanager
    def of_launch(cls, sp: int = 1) -> Iterator[Processes]:
        """Joined as long as the evaluation lasts; an error is shown once."""
        processes = cls(sp)
        try:
            yield processes
            if processes._agreement is not None:
                import torch.distributed as dist

                processes._agreement.gather(None)  # a rank that left early could end the others
                dist.destroy_process_group()
        except LongftError as error:
            if processes._said is None:
                raise
            processes._said.end(error)

    def first(self, work: Callable[[], Made]) -> Made:
        """What `work` gives on rank 0, on every rank."""
        return work() if self._agreement is None else self._agreement.on_rank0(work)

    def one_first(self, work: Callable[[], Made]) -> Made:
        """What `work` gives on each rank; rank 0 does it before the others, who find what it wrote."""
        return work() if self._agreement is None else self._agreement.rank0_first(work)

    def least(self, value: float) -> float:
        """The smallest of all ranks' values, on every rank."""
        return value if self._agreement is None else min(self._agreement.gather(value))

    def share_out(self, items: Sequence[Item], work: Callable[[Item], Made]) -> Iterator[Made]:
        """`work` of every item, in order, on rank 0; each sp group does every dp-th. Nothing on the others.

        A round is one item each: put items that take equally long beside each other.
        """
        dp, mine = self.layout.dp, self.layout.dp_rank
        for start in range(0, len(items), dp):
            made = [work(item) for item in items[start : start + dp][mine : mine + 1]]
            if self.layout.sp_rank:
                made = []  # the first of its group says it
            parts = [made] if self._agreement is None else self._agreement.gather(made)
            if self.launch.rank == 0:
                yield from (one for part in parts for one in part)

    def summed(self, array: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum over the sp group, on each of its ranks."""
        if self.layout.group is None:
            return array
        import torch
        import torch.distributed as dist

        total = torch.from_numpy(array).to(self.device)
        dist.all_reduce(total, group=self.layout.group)
        return total.cpu().numpy()
