"""Means over steps: rows differ, so the loss of a single step says little."""

from __future__ import annotations

import math
from collections.abc import Sequence

FEWEST = 60  # steps; a curve of fewer shows each of them


def steps_of_a_mean(steps: int) -> int:
    """A twentieth of the steps, but 10 at least, and no more than a third of them."""
    return max(1, min(max(10, steps // 20), steps // 3))


def first_and_last(values: Sequence[float]) -> tuple[int, float, float]:
    """(n, mean of the first n values, mean of the last n)."""
    n = steps_of_a_mean(len(values))
    return n, sum(values[:n]) / n, sum(values[-n:]) / n


def running_mean(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """Means of `count` finite (x, y) in a row, at the x of the middle one; [] for fewer points."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    middle = (count - 1) // 2
    return [(points[i + middle][0], (sums[i + count] - sums[i]) / count) for i in range(len(points) - count + 1)]
