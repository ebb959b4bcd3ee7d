"""Which rows are nearly the same, and which share text: MinHash for the first, sampled word windows for the second."""

from __future__ import annotations

import re
from collections.abc import Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ds_longft.data.rows import Turn
from ds_longft.tools.make_data.extras import needs_extra

SHINGLE_WORDS = 5
MAX_SHINGLES = 2048  # the smallest hashes of a long text stand for all of them
PERMUTATIONS = 128
SCHEME = "affine32"  # of datasketch 2
EDGE_CHARS = 200  # of a long question: the document between its ends may be asked about more than once
WINDOW_WORDS = 32  # a long sentence: less in common is a phrase, a heading, a line of a licence
SAMPLE = 8  # one window in eight is kept: a common passage of 64 words is found with 99%
_WORDS = re.compile(r"[\u3400-\u9fff\uac00-\ud7af]|[^\W\u3400-\u9fff\uac00-\ud7af]+")


def word_hashes(text: str) -> NDArray[np.uint64]:
    """[words] a 32-bit hash of each word, or Chinese character, in lower case."""
    words = _WORDS.findall(text.lower())
    return np.fromiter(map(crc32, map(str.encode, words)), dtype=np.uint64, count=len(words))


def windows(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """[windows] a hash of every run of `size` words; of all of them together where there are fewer."""
    if not len(words):
        return words
    size = min(size, len(words))
    total = np.zeros(len(words) - size + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for i in range(size):
            total = total * np.uint64(0x9E3779B97F4A7C15) + words[i : len(words) - size + 1 + i] + np.uint64(1)
        total ^= total >> np.uint64(31)
        total *= np.uint64(0xBF58476D1CE4E5B9)
    return total ^ (total >> np.uint64(27))


def anchors(turns: Sequence[Turn]) -> NDArray[np.uint64]:
    """Hashes of one in `SAMPLE` windows of every turn: rows that share a passage share some of them.

    What is sampled depends on the words alone, so the same passage gives the same anchors wherever it stands.
    """
    found = []
    for turn in turns:
        words = word_hashes(turn.content)
        if len(words) >= WINDOW_WORDS:  # less is a phrase, not a passage
            hashes = windows(words, WINDOW_WORDS)
            kept = hashes[hashes % np.uint64(SAMPLE) == 0]
            found.append(kept if len(kept) else hashes.min(keepdims=True))
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.uint64)


def signature(turns: Sequence[Turn]) -> NDArray[np.uint64]:
    """[PERMUTATIONS] MinHash of what makes a row itself: its answers, and the beginning and end of each question.

    Two questions about one document are two rows; the same question with the same answer is one. Raises `LongftError`:
    datasketch is missing.
    """
    with needs_extra("synth", "finding rows that are nearly the same"):
        from datasketch import MinHash
    parts = [t.content if t.trained else f"{t.content[:EDGE_CHARS]} {t.content[-EDGE_CHARS:]}" for t in turns]
    shingles = np.unique(windows(word_hashes("\n".join(parts)), SHINGLE_WORDS) >> np.uint64(32))[:MAX_SHINGLES]
    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=int, scheme=SCHEME)
    sketch.update_batch(shingles.tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint64)


def near_duplicates(signatures: Sequence[NDArray[np.uint64]], threshold: float) -> dict[int, int]:
    """Row -> the earlier row it nearly equals, for every row but the first of its kind.

    `threshold`: share of shingles in common (Jaccard) from which on two rows count as the same.
    """
    with needs_extra("synth", "finding rows that are nearly the same"):
        from datasketch import MinHash, MinHashLSH
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    same: dict[int, int] = {}
    for row, values in enumerate(signatures):
        sketch = MinHash(num_perm=PERMUTATIONS, hashvalues=values, hashfunc=int, scheme=SCHEME)
        likely = [other for other in sorted(index.query(sketch)) if np.mean(signatures[other] == values) >= threshold]
        if likely:
            same[row] = likely[0]
        else:
            index.insert(row, sketch)
    return same


def groups_sharing_text(rows: Sequence[NDArray[np.uint64]], common: int) -> NDArray[np.int64]:
    """[rows] number of the group each row belongs to: rows with a passage in common are in one group, and so on.

    `common`: passages that stand in more rows than this are instructions and notices, and tie nothing together.
    """
    with needs_extra("synth", "finding rows that share text"):
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components
    row_of = np.repeat(np.arange(len(rows)), [len(found) for found in rows])
    passage = np.concatenate([*rows, np.zeros(0, dtype=np.uint64)])
    order = np.argsort(passage, kind="stable")
    passage, row_of = passage[order], row_of[order]
    _, first, count = np.unique(passage, return_index=True, return_counts=True)
    tying = np.repeat(count <= common, count)
    start = np.zeros(len(passage), dtype=bool)
    start[first] = True
    at = np.flatnonzero(~start & tying)  # each row with the one before it that has the same passage
    links = coo_array((np.ones(len(at), dtype=np.int8), (row_of[at - 1], row_of[at])), shape=(len(rows), len(rows)))
    return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64)
