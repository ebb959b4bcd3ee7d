"""`PackPlan`: which rows share a pack, and which packs form an optimizer step. Pure functions of numbers.

Letters: n rows, P packs, G = dp * accumulation packs of one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ds_longft.data.fit import best_fit, next_fit

Packing = Literal["best_fit", "sorted", "none"]

# Length of a document at which attention takes as much work as everything linear, where the model is not known; that of
# an 8B model under LoRA. Only the balance of ranks hangs on it.
EQUAL_COST_TOKENS = 36_000
LIKE_PACKS = 32  # most packs of a step that are chosen for their like cost
ORDER_JITTER = 0.03  # of a row's length, when rows are laid by falling length: other rows meet each epoch


@dataclass(frozen=True)
class PackPlan:
    """One epoch. Step i trains packs i * G ... i * G + G - 1, whatever dp and accumulation make up G."""

    packs: list[NDArray[np.int64]]  # P arrays of row indices, in the order they lie in the pack
    pack_tokens: NDArray[np.int64]  # [P] without padding
    pack_costs: NDArray[np.float64]  # [P] work of each pack, in tokens: see `costs_of`
    dp: int
    accumulation: int

    def __len__(self) -> int:
        """Optimizer steps of the epoch."""
        return math.ceil(len(self.packs) / (self.dp * self.accumulation))

    @cached_property
    def steps(self) -> list[list[list[int | None]]]:
        """`steps[i][dp_rank][slot]`: pack index, or None for a filler where the last step has too few packs."""
        return [self.step(i) for i in range(len(self))]

    def step(self, index: int) -> list[list[int | None]]:
        """One entry of `steps`. Micro-step by micro-step over the ranks: fillers come last, spread over the ranks.

        The packs of a step stand in groups of falling cost, so the ranks are dealt to there and back: the one that has
        the costliest pack of a micro-step has the cheapest of the next.
        """
        first = index * self.dp * self.accumulation

        def pack(rank: int, slot: int) -> int | None:
            number = first + slot * self.dp + (rank if slot % 2 == 0 else self.dp - 1 - rank)
            return number if number < len(self.packs) else None

        return [[pack(rank, slot) for slot in range(self.accumulation)] for rank in range(self.dp)]

    def packs_of_step(self, index: int) -> range:
        """Indices of every pack of a step, over all dp ranks and micro-steps."""
        size = self.dp * self.accumulation
        return range(index * size, min((index + 1) * size, len(self.packs)))

    def imbalance(self) -> NDArray[np.float64]:
        """[steps] cost of the costliest rank over the mean, micro-step by micro-step: 1 where nobody waits.

        Ranks meet in every micro-step (ZeRO-3 gathers weights together), so a step takes the sum of its micro-steps'
        maxima. The last step counts without its fillers' ranks.
        """
        return np.asarray([self._imbalance_of(self.step(i)) for i in range(len(self))])

    def _imbalance_of(self, step: list[list[int | None]]) -> float:
        slots = [[self.pack_costs[p] for p in slot if p is not None] for slot in zip(*step, strict=True)]
        slots = [slot for slot in slots if slot]
        return float(sum(max(slot) for slot in slots) / sum(sum(slot) / len(slot) for slot in slots))


def plan_epoch(
    lengths: NDArray[np.int64],
    *,
    budget_tokens: int,
    dp: int,
    accumulation: int,
    seed: int,
    epoch: int,
    packing: Packing,
    shuffle: bool = True,
    equal_cost_tokens: int = EQUAL_COST_TOKENS,
) -> PackPlan:
    """Lay rows into packs and packs into steps.

    Args:
        lengths: [n] tokens of each row.
        budget_tokens: tokens of a full pack; a longer row is a pack alone.
        dp, accumulation: data-parallel ranks, and micro-steps of each in one optimizer step.
        seed, epoch: what shares a pack, order in a pack and order of packs are drawn from these two.
        packing: `best_fit` (longest first) fills packs best. `sorted` lays rows of like length together (LongAlign's
            sorted batching). Both choose packs of like cost for a step. `none`: one row a pack, in any order.
        shuffle: False keeps packs, and rows in them, in the order of the rows.
        equal_cost_tokens: length of a document at which attention costs as much as everything linear.

    Does not depend on sp; on dp and accumulation the steps depend only through their product.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if packing == "none":
        packs = list(order.reshape(-1, 1))
    else:
        sizes = lengths[order]
        rank = sizes * np.exp(rng.normal(0.0, ORDER_JITTER, len(sizes))) if shuffle else sizes
        fit = best_fit if packing == "best_fit" else next_fit
        groups = fit(sizes, budget_tokens, np.argsort(-rank, kind="stable"))
        packs = [order[rng.permutation(group) if shuffle else np.sort(group)] for group in groups]
        packs = [packs[i] for i in (rng.permutation(len(packs)) if shuffle else np.argsort([p[0] for p in packs]))]
    tokens, costs = _sums(packs, lengths), _sums(packs, costs_of(lengths, equal_cost_tokens))
    if shuffle:
        chosen = _in_steps(costs, dp * accumulation, rng, like=packing != "none")
        packs, tokens, costs = [packs[i] for i in chosen], tokens[chosen], costs[chosen]
    return PackPlan(packs, tokens, costs, dp, accumulation)


def costs_of(lengths: NDArray[np.int64], equal_cost_tokens: int = EQUAL_COST_TOKENS) -> NDArray[np.float64]:
    """[n] work of each document, in tokens of a short one: length + length^2 / `equal_cost_tokens`."""
    exact = lengths.astype(np.float64)
    return exact + exact * exact / equal_cost_tokens


def _sums(packs: Sequence[NDArray[np.int64]], values: NDArray[Any]) -> NDArray[Any]:
    """[P] sum of `values` over the rows of each pack."""
    if not packs:
        return values[:0]
    sizes = np.fromiter((len(pack) for pack in packs), dtype=np.int64, count=len(packs))
    return np.add.reduceat(values[np.concatenate(packs)], np.cumsum(sizes) - sizes)


def _in_steps(costs: NDArray[np.float64], size: int, rng: np.random.Generator, *, like: bool) -> NDArray[np.int64]:
    """[P] the packs in the order they are trained: steps of `size`, in each of them groups of falling cost.

    With `like`, a group is a run of the packs sorted by cost, drawn at random. A step is one group, or several where it
    has more than `LIKE_PACKS` packs: the larger a step, the more of the data it should see. The packs that fill no step
    are a run from a random place, and come last.
    """
    count = len(costs)
    whole = count - count % size
    ranked = np.argsort(-costs, kind="stable") if like else np.arange(count)  # they were shuffled before
    left_at = int(rng.integers(whole + 1)) if like else whole
    left = ranked[left_at : left_at + count - whole]
    ranked = np.concatenate([ranked[:left_at], ranked[left_at + count - whole :]])
    group = max((d for d in range(1, LIKE_PACKS + 1) if size % d == 0), default=1)
    if not like or group < min(size, 8):
        group = size
    groups = ranked.reshape(-1, group)
    groups = groups[rng.permutation(len(groups))] if like else groups
    falling = np.take_along_axis(groups, np.argsort(-costs[groups], axis=1, kind="stable"), axis=1)
    left = left[np.argsort(-costs[left], kind="stable")]
    return np.concatenate([falling.reshape(-1), left]).astype(np.int64)
