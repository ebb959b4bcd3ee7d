"""How far a mean over few rows may be off: the bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 2000


def mean_with_interval(groups: Sequence[Sequence[float]]) -> list[float]:
    """[mean, low, high]: the mean of the groups' means, and where 95 % of it lie when each group's rows are drawn anew.

    Groups are tasks or places in the text: every one counts the same. Where each has one row alone, which drawn anew is
    itself, all are drawn as one. The same groups give the same interval.
    """
    rng = np.random.default_rng(0)
    if all(len(group) == 1 for group in groups):
        groups = [[value for (value,) in groups]]
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    drawn = [group[rng.integers(len(group), size=(DRAWS, len(group)))].mean(1) for group in values]  # [DRAWS] each
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return [round(float(x), 4) for x in (np.mean([group.mean() for group in values]), low, high)]
