"""Documents dealt whole to ranks: none is lost or split, no rank has too much, and even packs are always dealt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_longft.data.deal import MOST_UNEVEN, deal_documents
from ds_longft.data.pack_plan import costs_of

EQUAL_COST = 36_000


@pytest.mark.parametrize("sp", [2, 4, 8])
@pytest.mark.parametrize("lengths", [[16_384] * 8, [1000] * 131, [65_536] * 8, [700, 800, 900, 1000] * 32])
def test_even_packs_are_dealt(lengths: list[int], sp: int) -> None:
    most = -(-sum(lengths) // sp) + 400
    dealt = deal_documents(np.asarray(lengths), sp, most, EQUAL_COST)
    assert dealt is not None or len(lengths) % sp, "131 documents do not go evenly into 8 parts"
    if dealt is not None:
        assert sorted(i for part in dealt for i in part) == list(range(len(lengths)))


@pytest.mark.parametrize(
    ("lengths", "why"),
    [
        ([131_072], "one document is longer than a part"),
        ([40_000, 40_000, 40_000], "three do not go into two"),
        ([65_000, *[1000] * 65], "attention of the long one takes longer than all the others"),
        ([], "nothing to deal"),
    ],
)
def test_packs_that_are_split(lengths: list[int], why: str) -> None:
    assert deal_documents(np.asarray(lengths, dtype=np.int64), 2, 65_536, EQUAL_COST) is None, why


@pytest.mark.parametrize(("count", "sp"), [(20, 21), (23, 24), (31, 32), (61, 64)])
def test_every_rank_gets_a_document(count: int, sp: int) -> None:
    """An idle rank of so many is within what counts as even, and another pack of the epoch may be full."""
    assert deal_documents(np.full(count, 1000), sp, 1000, EQUAL_COST) is None
    assert deal_documents(np.full(sp, 1000), sp, 1000, EQUAL_COST) == [[i] for i in range(sp)]


def test_a_full_pack_is_dealt_to_the_token() -> None:
    """262 tokens are missing to a full pack of 131,072: neither part may have more than 65,536."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(50):
        lengths = rng.integers(500, 9000, 40)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 131_072 - 9000))]
        lengths = np.append(lengths, 131_072 - 262 - lengths.sum())
        dealt = deal_documents(lengths, 2, 65_536, EQUAL_COST)
        found += dealt is not None
        if dealt is not None:
            assert max(lengths[part].sum() for part in dealt) <= 65_536
    assert found >= 45


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    sp=st.integers(2, 40),
    spare=st.floats(1.0, 1.3),
)
def test_dealt_documents_keep_what_was_promised(lengths: list[int], sp: int, spare: float) -> None:
    array = np.asarray(lengths)
    most = int(np.ceil(array.sum() / sp * spare))
    dealt = deal_documents(array, sp, most, EQUAL_COST)
    assert dealt == deal_documents(array, sp, most, EQUAL_COST), "the same on every rank"
    if dealt is None:
        return
    assert sorted(i for part in dealt for i in part) == list(range(len(lengths)))
    assert len(dealt) == sp
    assert all(dealt)
    assert max(array[part].sum() for part in dealt) <= most
    work = [costs_of(array[part], EQUAL_COST).sum() for part in dealt]
    assert max(work) <= MOST_UNEVEN * np.mean(work) * (1 + 1e-9)
