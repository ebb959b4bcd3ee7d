"""Laying lengths into bins of one size: `best_fit` for full bins, `next_fit` for bins of neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WORD_BITS = 1024


def best_fit(lengths: NDArray[np.int64], budget: int, order: NDArray[np.int64]) -> list[list[int]]:
    """Indices grouped so that no group exceeds `budget`: in this order, each into the fullest group that takes it.

    What is longer than `budget` is a group of its own.

    The free space of the groups is a set of integers kept as bits in two levels (a word of bits for each 1024 sizes,
    and one bit for each word that is not empty), so that "the smallest size of at least x" takes two shifts: 1e6 rows
    in about three seconds.
    """
    groups: list[list[int]] = []
    free: dict[int, list[int]] = {}  # free tokens -> groups with exactly that much
    words = [0] * (budget // _WORD_BITS + 1)
    filled = 0  # bit w: words[w] is not 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        space = _smallest_from(words, filled, length) if length <= budget else None
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
        if left > 0:
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


def next_fit(lengths: NDArray[np.int64], budget: int, order: NDArray[np.int64]) -> list[list[int]]:
    """Indices in this order, cut into runs of at most `budget`: neighbours in the order stay together.

    What is longer than `budget` is a run of its own.
    """
    groups: list[list[int]] = []
    free = 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length > free or not groups:
            groups.append([])
            free = budget
        groups[-1].append(index)
        free -= length
    return groups
