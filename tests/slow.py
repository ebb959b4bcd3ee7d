"""Cases that a neighbour in `make test` stands for: the same kind, of another model or number of ranks. `make test-all` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some_slow(names: Iterable[str], *slow: str) -> list[Any]:
    """The names for `parametrize`, these of them marked `slow`."""
    every = list(names)
    assert set(slow) <= set(every), sorted(set(slow) - set(every))
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in every]
