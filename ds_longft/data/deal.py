"""Documents of a pack dealt whole to the sp ranks, so that attention needs no exchange between them.

Where documents are shorter than a rank's part, splitting them buys nothing: each rank can hold some of them whole and
attend to them alone, with all heads. Which row lies in which pack does not change, so neither does what is trained.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ds_longft.data.pack_plan import costs_of

MOST_UNEVEN = 1.05
"""The costliest rank over the mean. Beyond, waiting for it costs what the exchange does: 12 % of a step of 16,384-token
documents on GPUs joined by NVLink (8B shapes, sp 2 beside one GPU; benchmarks/results.jsonl), more on slower links."""


def deal_documents(
    lengths: NDArray[np.int64], sp: int, most_tokens: int, equal_cost_tokens: int
) -> list[list[int]] | None:
    """Numbers of the documents of each of `sp` ranks, each in order and none without one; None where they cannot be
    dealt evenly.

    Args:
        lengths: [N] tokens of the documents of a pack.
        sp: ranks.
        most_tokens: no rank gets more.
        equal_cost_tokens: length at which attention costs as much as everything linear, see `costs_of`.

    Costliest first, each to the rank that has least to do (Graham's LPT rule); then documents of like length change
    places, or one moves, until no rank has too many tokens.
    """
    costs = costs_of(lengths, equal_cost_tokens)
    # From 21 ranks on, one without a document would be within MOST_UNEVEN; models do not take a pass without tokens.
    if len(lengths) < sp or max(lengths.max() * sp, lengths.sum()) > most_tokens * sp:
        return None
    if costs.max() * sp > MOST_UNEVEN * costs.sum():
        return None
    rank_of = np.zeros(len(lengths), dtype=np.int64)
    work = np.zeros(sp)
    for i in np.argsort(-costs, kind="stable"):
        rank_of[i] = np.argmin(work)
        work[rank_of[i]] += costs[i]
    while True:
        tokens = np.bincount(rank_of, weights=lengths, minlength=sp).astype(np.int64)
        full, light = int(np.argmax(tokens)), int(np.argmin(tokens))
        if tokens[full] <= most_tokens:
            break
        change = _best_change(lengths, np.flatnonzero(rank_of == full), np.flatnonzero(rank_of == light))
        if change is None:
            return None
        out, back = change
        rank_of[out] = light
        if back is not None:
            rank_of[back] = full
    if np.bincount(rank_of, weights=costs, minlength=sp).max() * sp > MOST_UNEVEN * costs.sum():
        return None
    return [np.flatnonzero(rank_of == rank).tolist() for rank in range(sp)]


def _best_change(
    lengths: NDArray[np.int64], full: NDArray[np.int64], light: NDArray[np.int64]
) -> tuple[int, int | None] | None:
    """What evens two ranks most: (document that leaves the full one, document that comes for it or None).

    None where nothing does. Each change makes the squares of the ranks' tokens add up to less, so they come to an end.
    """
    gap = int(lengths[full].sum() - lengths[light].sum())
    given = lengths[full][:, None] - np.append(lengths[light], 0)[None, :]  # [full, light + 1]; the last: nothing comes
    missed = np.where((given > 0) & (given < gap), np.abs(2 * given - gap), gap)
    i, j = np.unravel_index(np.argmin(missed), missed.shape)
    if missed[i, j] >= gap:
        return None
    return int(full[i]), int(light[j]) if j < len(light) else None
