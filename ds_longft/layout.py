"""`ParallelLayout`: which rank holds which part of which sample. Arithmetic first, then process groups.

Ranks of one sp group are consecutive, so that they share a node whenever sp divides the node's GPUs:
with world 8 and sp 4, ranks 0-3 share one sample (dp rank 0) and ranks 4-7 another (dp rank 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelLayout:
    """Frozen coordinates of one rank; passed explicitly to the code that communicates.

    `group` is this rank's sp group; None when sp is 1, where nothing is exchanged.
    """

    world: int
    rank: int
    sp: int
    group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        assert self.sp >= 1 and self.world % self.sp == 0, f"sp {self.sp} does not divide world {self.world}"
        assert 0 <= self.rank < self.world

    @property
    def dp(self) -> int:
        """How many samples are trained on at the same time."""
        return self.world // self.sp

    @property
    def sp_rank(self) -> int:
        """Which contiguous part of the sample this rank holds."""
        return self.rank % self.sp

    @property
    def dp_rank(self) -> int:
        """Which of the `dp` samples this rank works on."""
        return self.rank // self.sp

    def ranks_of(self, dp_rank: int) -> list[int]:
        """Global ranks that share the sample of `dp_rank`, in sp order."""
        return list(range(dp_rank * self.sp, (dp_rank + 1) * self.sp))

    @classmethod
    def create(cls, sp: int) -> ParallelLayout:
        """Make the sp groups; collective, every rank of the initialised default group calls it with the same sp."""
        import torch.distributed as dist

        world, rank = dist.get_world_size(), dist.get_rank()
        plain = cls(world, rank, sp)
        if sp == 1:
            return plain
        # new_group is collective over the world: every rank makes every group, in the same order.
        groups = [dist.new_group(plain.ranks_of(i)) for i in range(plain.dp)]
        return cls(world, rank, sp, groups[plain.dp_rank])
