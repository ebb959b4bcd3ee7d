import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_longft.batch import IGNORE_INDEX
from ds_longft.data.pack import build_pack, filler_pack, plan_epoch
from ds_longft.data.plan import best_fit_decreasing
from ds_longft.data.tokenized import TokenizedRow

BUDGET = 3000  # more than one word of the free-space set


def plan(lengths, dp=2, accumulation=3, seed=0, epoch=0, packing="best_fit", **more):
    lengths = np.asarray(lengths, dtype=np.int64)
    return plan_epoch(
        lengths, budget_tokens=BUDGET, dp=dp, accumulation=accumulation, seed=seed, epoch=epoch, packing=packing, **more
    )


@given(st.lists(st.integers(1, BUDGET), max_size=60))
def test_best_fit_equals_the_plain_definition(lengths):
    groups = best_fit_decreasing(np.asarray(lengths, dtype=np.int64), BUDGET)
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [space for space in free if space >= length]
        if fits:
            free[free.index(min(fits))] -= length
        else:
            free.append(BUDGET - length)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert sorted(BUDGET - sum(lengths[i] for i in group) for group in groups) == sorted(free)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=50),
    dp=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    packing=st.sampled_from(["best_fit", "none"]),
    shuffle=st.booleans(),
)
def test_every_row_is_trained_once_an_epoch(lengths, dp, accumulation, packing, shuffle):
    made = plan(lengths, dp, accumulation, packing=packing, shuffle=shuffle)
    slots = [pack for step in made.steps for rank in step for pack in rank]
    assert all(len(step) == dp and all(len(rank) == accumulation for rank in step) for step in made.steps)
    assert sorted(p for p in slots if p is not None) == list(range(len(made.packs)))
    assert len(slots) - len(made.packs) < dp * accumulation, "fillers in the last step only"
    assert sorted(np.concatenate(made.packs).tolist()) == list(range(len(lengths)))
    assert made.pack_tokens.tolist() == [sum(lengths[i] for i in pack) for pack in made.packs]
    assert made.pack_tokens.max() <= BUDGET
    for i in range(len(made)):
        assert set(made.packs_of_step(i)) == {p for rank in made.steps[i] for p in rank} - {None}


def test_the_plan_follows_seed_and_epoch_and_nothing_else():
    lengths = np.random.default_rng(0).integers(1, BUDGET, 200)

    def order(**more):
        return [pack.tolist() for pack in plan(lengths, **more).packs]

    assert order() == order()
    assert order(seed=1) != order()
    assert order(epoch=1) != order()
    assert order(shuffle=False) == order(shuffle=False, seed=1, epoch=5)


def test_steps_hold_the_same_packs_for_any_dp_and_accumulation_of_one_product():
    lengths = np.random.default_rng(0).integers(1, BUDGET, 100)
    plans = [plan(lengths, dp, 12 // dp) for dp in (1, 2, 4, 12)]
    for i in range(len(plans[0])):
        assert len({frozenset(p for rank in made.steps[i] for p in rank if p is not None) for made in plans}) == 1


def test_packs_are_shuffled_and_well_filled():
    lengths = np.random.default_rng(0).integers(1, BUDGET // 4, 2000)
    made = plan(lengths)
    assert made.pack_tokens.sum() > 0.99 * BUDGET * (len(made.packs) - 1)
    assert abs(np.corrcoef([lengths[p].max() for p in made.packs], np.arange(len(made.packs)))[0, 1]) < 0.2


def test_a_hundred_thousand_rows_take_no_time():
    lengths = np.minimum(np.exp(np.random.default_rng(0).normal(7, 1, 100_000)).astype(np.int64) + 1, 131072)
    start = time.process_time()
    plan_epoch(lengths, budget_tokens=131072, dp=8, accumulation=1, seed=0, epoch=0, packing="best_fit")
    assert time.process_time() - start < 5


def row(ids, spans, index=0, row_weight=1.0):
    starts, ends, weights = zip(*spans, strict=True)
    return TokenizedRow(
        index=index,
        input_ids=np.asarray(ids, dtype=np.int32),
        span_start=np.asarray(starts, dtype=np.int32),
        span_end=np.asarray(ends, dtype=np.int32),
        span_weight=np.asarray(weights, dtype=np.float32),
        row_weight=row_weight,
        targets=sum(end - max(start, 1) for start, end, _ in spans),
    )


FIRST = row([10, 11, 12, 13, 14], [(2, 4, 1.0)], index=7)
SECOND = row([20, 21, 22, 23], [(0, 2, 0.5), (3, 4, 1.0)], index=3, row_weight=2.0)


def test_labels_positions_and_borders_by_hand():
    pack = build_pack([FIRST, SECOND], pad_to_multiple=4, pad_id=9, weighting="token")
    x = IGNORE_INDEX
    assert pack.input_ids.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 23, 9, 9, 9]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert pack.labels.tolist() == [x, 12, 13, x, x, 21, x, 23, x, x, x, x]
    assert pack.loss_weights.tolist() == [0, 1, 1, 0, 0, 1, 0, 2, 0, 0, 0, 0]
    assert pack.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert (pack.padding_tokens, pack.rows, pack.tokens) == (3, (7, 3), 12)
    kinds = (
        pack.input_ids.dtype,
        pack.position_ids.dtype,
        pack.labels.dtype,
        pack.loss_weights.dtype,
        pack.cu_seqlens.dtype,
    )
    assert kinds == (np.int64, np.int64, np.int64, np.float32, np.int32)


def test_sample_weighting_divides_by_the_targets_of_the_row():
    pack = build_pack([FIRST, SECOND], pad_to_multiple=1, pad_id=9, weighting="sample")
    assert pack.loss_weights.tolist() == [0, 0.5, 0.5, 0, 0, 0.5, 0, 1.0, 0]
    assert pack.padding_tokens == 0


def test_a_filler_trains_nothing():
    pack = filler_pack(8)
    assert pack.loss_weights.sum() == 0
    assert (pack.labels == IGNORE_INDEX).all()
    assert pack.cu_seqlens.tolist() == [0, 8]
    assert pack.padding_tokens == pack.tokens == 8


@given(
    shape=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 19), st.integers(1, 10)), min_size=1, max_size=6),
    multiple=st.integers(1, 9),
    weighting=st.sampled_from(["token", "sample"]),
)
def test_no_label_crosses_a_border_and_every_target_is_there(shape, multiple, weighting):
    rows = []
    for i, (length, wish, size) in enumerate(shape):
        start = min(wish, length - 1)
        rows.append(row(range(100 * i, 100 * i + length), [(start, min(start + size, length), 1.0)], index=i))
    rows = [r for r in rows if r.targets]
    if not rows:
        return
    pack = build_pack(rows, pad_to_multiple=multiple, pad_id=0, weighting=weighting)
    assert pack.tokens % multiple == 0
    assert int((pack.labels != IGNORE_INDEX).sum()) == sum(r.targets for r in rows)
    at = np.flatnonzero(pack.labels != IGNORE_INDEX)
    assert (pack.labels[at] == pack.input_ids[at + 1]).all()
    document = np.searchsorted(pack.cu_seqlens, np.arange(pack.tokens), side="right")
    assert (document[at] == document[at + 1]).all()
    assert ((pack.loss_weights > 0) == (pack.labels != IGNORE_INDEX)).all()
    expected = len(rows) if weighting == "sample" else sum(r.targets for r in rows)
    assert pack.loss_weights.sum(dtype=np.float64) == pytest.approx(expected)
