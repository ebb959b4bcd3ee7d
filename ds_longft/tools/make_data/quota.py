"""How many rows of each kind make a mix: the most that keep every share, in the proportions of what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ds_longft.errors import DataError

ROUNDS = 300
TOLERANCE = 0.002  # of the total
HALF_A_ROW = 0.5  # shares of few rows cannot be met more finely
BISECTIONS = 40


@dataclass(frozen=True)
class Margin:
    """What is wanted of some cells together: a share of the mix, or a number of rows at most."""

    name: str
    cells: NDArray[np.bool_]  # [cells]
    share: float | None = None
    most: int | None = None


def partition(name: str, of_cell: Sequence[str], shares: dict[str, float]) -> list[Margin]:
    """Margins for `shares` of a property (`of_cell` its value in each cell); what they leave is for the other values.

    Raises:
        DataError: nothing in the pool has a wanted value, or the shares leave room that nothing can fill.
    """
    if not shares:
        return []
    values = np.asarray(of_cell)
    missing = sorted(value for value, share in shares.items() if share > 0 and not (values == value).any())
    if missing:
        raise DataError(f"{name}: no usable row is {' or '.join(missing)}; seen are {', '.join(sorted(set(of_cell)))}")
    rest, left = ~np.isin(values, list(shares)), 1 - sum(shares.values())
    if left > TOLERANCE and not rest.any():
        raise DataError(f"{name}: the shares add up to {1 - left:.3f}, and no row has any other value: make it 1")
    margins = [Margin(f"{name} {value}", values == value, share=share) for value, share in shares.items()]
    left = left if left > TOLERANCE else 0.0  # shares that add up to 1 leave 1e-16
    return [*margins, Margin(f"{name} (others)", rest, share=left)]


def quotas(available: NDArray[np.int64], margins: Sequence[Margin], total: int | None) -> NDArray[np.int64]:
    """[cells] how many rows of each cell to take.

    As many as possible (`total` at most) such that every share holds to `TOLERANCE`, found by raking: scaling the cells
    of one margin after the other until all fit (iterative proportional fitting, Deming and Stephan 1940), no cell above
    what it has. Raises `DataError` when not a single row can be taken.
    """
    most = min(int(available.sum()), total or int(available.sum()))
    best = _rake(available, margins, most, at_least=HALF_A_ROW)
    low, high = 0.0, float(most)
    for _ in range(BISECTIONS if best is None else 0):
        middle = (low + high) / 2
        found = _rake(available, margins, middle)
        if found is None:
            high = middle
        else:
            best, low = found, middle
        if high - low < 0.5:
            break
    if best is None or best.sum() < 0.5:
        raise DataError("the shares of the recipe cannot be met together by the rows there are: loosen one of them")
    return _whole(best, available, margins)


def _rake(
    available: NDArray[np.int64], margins: Sequence[Margin], total: float, at_least: float = 0.0
) -> NDArray[np.float64] | None:
    """[cells] the fit for this total, or None where there is none. `at_least`: rows that any share may miss."""
    top = available.astype(np.float64)
    cells = top * min(1.0, total / max(1.0, top.sum()))
    everything = Margin("", np.ones(len(top), dtype=bool), share=1.0)
    for _ in range(ROUNDS):
        worst = 0.0
        for margin in (*margins, everything):
            now = cells[margin.cells].sum()
            wish = total * margin.share if margin.share is not None else now
            if margin.most is not None:
                wish = min(wish, margin.most)
            worst = max(worst, abs(now - wish))
            if now > 0:
                cells[margin.cells] = np.minimum(cells[margin.cells] * (wish / now), top[margin.cells])
            elif wish > 0:
                return None
        if worst <= max(TOLERANCE * total, at_least):
            return cells
    return None


def _whole(cells: NDArray[np.float64], available: NDArray[np.int64], margins: Sequence[Margin]) -> NDArray[np.int64]:
    """Rounded so that the sum stays, the largest remainders up; a number of rows that is a limit is one to the row."""
    whole = np.minimum(np.floor(cells), available).astype(np.int64)
    missing = round(float(cells.sum())) - int(whole.sum())
    for cell in np.argsort(whole - cells, kind="stable"):
        if missing > 0 and whole[cell] < available[cell]:
            whole[cell] += 1
            missing -= 1
    for margin in margins:
        while margin.most is not None and whole[margin.cells].sum() > margin.most:
            whole[np.argmax(np.where(margin.cells, whole, -1))] -= 1
    return whole
