"""Worker pools shared by the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """`pools(world)`: the session's pool of that many ranks."""
    made: dict[int, WorkerPool] = {}

    def pool(world: int) -> WorkerPool:
        return made.setdefault(world, WorkerPool(world))

    yield pool
    for each in made.values():
        each.stop()
