"""`PackPlan`: which rows share a pack, and which packs form an optimizer step. Pure functions of numbers.

Letters: n rows, P packs, G = dp * accumulation packs of one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Packing = Literal["best_fit", "none"]
_WORD_BITS = 1024


@dataclass(frozen=True)
class PackPlan:
    """One epoch. Step i trains packs i * G ... i * G + G - 1, whatever dp and accumulation make up G."""

    packs: list[NDArray[np.int64]]  # P arrays of row indices, in the order they lie in the pack
    pack_tokens: NDArray[np.int64]  # [P] without padding
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
        """One entry of `steps`. Micro-step by micro-step over the ranks: fillers come last, spread over the ranks."""
        first = index * self.dp * self.accumulation

        def pack(rank: int, slot: int) -> int | None:
            number = first + slot * self.dp + rank
            return number if number < len(self.packs) else None

        return [[pack(rank, slot) for slot in range(self.accumulation)] for rank in range(self.dp)]

    def packs_of_step(self, index: int) -> range:
        """Indices of every pack of a step, over all dp ranks and micro-steps."""
        size = self.dp * self.accumulation
        return range(index * size, min((index + 1) * size, len(self.packs)))


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
) -> PackPlan:
    """Lay rows into packs and packs into steps.

    Args:
        lengths: [n] tokens of each row, each at most `budget_tokens`.
        budget_tokens: tokens of a full pack.
        dp, accumulation: data-parallel ranks, and micro-steps of each in one optimizer step.
        seed, epoch: rows of equal length, order in a pack and order of packs are drawn from these two.
        packing: `best_fit` (decreasing) or `none`, one row a pack.
        shuffle: False keeps packs, and rows in them, in the order of the rows.

    Does not depend on sp; on dp and accumulation the steps depend only through their product.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= budget_tokens, "rows over the budget are treated when tokenized"
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    if packing == "none":
        packs = list(order.reshape(-1, 1))
    else:
        packs = [order[members] for members in best_fit_decreasing(lengths[order], budget_tokens)]
        if shuffle:
            packs = [rng.permutation(pack) for pack in packs]
        else:
            packs = sorted((np.sort(pack) for pack in packs), key=lambda pack: int(pack[0]))
        if shuffle:
            packs = [packs[i] for i in rng.permutation(len(packs))]
    tokens = np.fromiter((lengths[pack].sum() for pack in packs), dtype=np.int64, count=len(packs))
    return PackPlan(packs, tokens, dp, accumulation)


def best_fit_decreasing(lengths: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Indices grouped so that no group exceeds `budget`: longest first, each into the fullest group that takes it.

    The free space of the groups is a set of integers kept as bits in two levels (a word of bits for each 1024 sizes,
    and one bit for each word that is not empty), so that "the smallest size of at least x" takes two shifts: 1e6 rows
    in about three seconds.
    """
    groups: list[list[int]] = []
    free: dict[int, list[int]] = {}  # free tokens -> groups with exactly that much
    words = [0] * (budget // _WORD_BITS + 1)
    filled = 0  # bit w: words[w] is not 0
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        space = _smallest_from(words, filled, length)
        if space is None:
            group, left = len(groups), budget - length
            groups.append([index])
        else:
            same = free[space]
            group, left = same.pop(), space - length
            groups[group].append(index)
            if not same:
                word, bit = divmod(space, _WORD_BITS)
                words[word] ^= 1 << bit
                if not words[word]:
                    filled ^= 1 << word
        if left:
            same = free.setdefault(left, [])
            if not same:
                word, bit = divmod(left, _WORD_BITS)
                words[word] |= 1 << bit
                filled |= 1 << word
            same.append(group)
    return groups


def _smallest_from(words: Sequence[int], filled: int, at_least: int) -> int | None:
    word, bit = divmod(at_least, _WORD_BITS)
    bits = words[word] >> bit
    if bits:
        return at_least + _lowest(bits)
    rest = filled >> (word + 1)
    if not rest:
        return None
    word += 1 + _lowest(rest)
    return word * _WORD_BITS + _lowest(words[word])


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
