"""Hypothesis for all tests: the same examples every time, however fast the machine is. Worker pools of the session. Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.distributed.pool import WorkerPool

# In a fresh clone the first text it draws takes a second: it builds its tables of characters.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Test processes of `make test` ignore Ctrl-C, and what they start would inherit that: end on it, as pytest alone does."""
    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


POOLS = pytest.StashKey[dict[int, "WorkerPool"]]()


@pytest.fixture(scope="session")
def pools(pytestconfig: pytest.Config) -> Iterator[Callable[[int], WorkerPool]]:
    """`pools(world)`: the session's pool of that many ranks."""
    from tests.distributed.pool import WorkerPool

    made = pytestconfig.stash.setdefault(POOLS, {})

    def pool(world: int) -> WorkerPool:
        return made.setdefault(world, WorkerPool(world))

    yield pool
    stop_pools(pytestconfig)


def stop_pools(config: pytest.Config) -> None:
    for each in config.stash.get(POOLS, {}).values():
        each.stop()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ranks that wait take 0.6 % of a core each: they end with the folder that used them, and are forked anew where needed."""
    if nextitem is not None and nextitem.path.parent != item.path.parent:
        stop_pools(item.config)
