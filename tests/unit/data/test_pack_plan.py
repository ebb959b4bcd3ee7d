"""Plans of an epoch: every row once, for any ranks; full packs; ranks that wait little; an order that stays random."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_longft.data.fit import best_fit, next_fit
from ds_longft.data.pack_plan import costs_of, plan_epoch

BUDGET = 3000  # more than one word of the free-space set


def plan(lengths, dp=2, accumulation=3, seed=0, epoch=0, packing="best_fit", **more):
    lengths = np.asarray(lengths, dtype=np.int64)
    return plan_epoch(
        lengths, budget_tokens=BUDGET, dp=dp, accumulation=accumulation, seed=seed, epoch=epoch, packing=packing, **more
    )


@given(st.lists(st.one_of(st.integers(1, BUDGET), st.integers(BUDGET + 1, 5 * BUDGET)), max_size=60))
def test_best_fit_equals_the_plain_definition(lengths):
    """What is longer than the budget is a group of its own."""
    array = np.asarray(lengths, dtype=np.int64)
    groups = best_fit(array, BUDGET, np.argsort(-array, kind="stable"))
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
    lengths=st.lists(st.integers(1, 2 * BUDGET), min_size=1, max_size=50),
    dp=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    packing=st.sampled_from(["best_fit", "sorted", "none"]),
    shuffle=st.booleans(),
)
def test_every_row_is_trained_once_an_epoch(lengths, dp, accumulation, packing, shuffle):
    """In packs of the budget, or alone where it is longer."""
    made = plan(lengths, dp, accumulation, packing=packing, shuffle=shuffle)
    slots = [pack for step in made.steps for rank in step for pack in rank]
    assert all(len(step) == dp and all(len(rank) == accumulation for rank in step) for step in made.steps)
    assert sorted(p for p in slots if p is not None) == list(range(len(made.packs)))
    assert len(slots) - len(made.packs) < dp * accumulation, "fillers in the last step only"
    assert sorted(np.concatenate(made.packs).tolist()) == list(range(len(lengths)))
    assert made.pack_tokens.tolist() == [sum(lengths[i] for i in pack) for pack in made.packs]
    assert all(len(p) == 1 for p, tokens in zip(made.packs, made.pack_tokens, strict=True) if tokens > BUDGET)
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


def longalign_like(rows, rng):
    """LongAlign's training set: 8K to 64K, most below 24K, and as many short chats (ShareGPT)."""
    long = np.clip(np.exp(rng.normal(np.log(16_000), 0.55, rows // 2)), 8000, 65536)
    return np.concatenate([long, np.exp(rng.normal(6, 1, rows // 2)) + 16]).astype(np.int64)


@pytest.fixture(scope="module")
def lengths():
    return longalign_like(10_000, np.random.default_rng(0))


def of_longalign(lengths, packing, dp=8, accumulation=1, epoch=0):
    return plan_epoch(
        lengths, budget_tokens=65536, dp=dp, accumulation=accumulation, seed=0, epoch=epoch, packing=packing
    )


def test_best_fit_fills_99_percent(lengths):
    made = of_longalign(lengths, "best_fit")
    assert made.pack_tokens.sum() > 0.99 * 65536 * len(made.packs)
    alone = of_longalign(lengths[:5000], "best_fit")  # no short row to fill the gaps: every row has 8,000 or more
    assert alone.pack_tokens.sum() > 0.98 * 65536 * len(alone.packs)


@pytest.mark.parametrize(("dp", "accumulation"), [(8, 1), (2, 4), (4, 8), (16, 1), (3, 5)])
@pytest.mark.parametrize("packing", ["best_fit", "sorted"])
def test_ranks_wait_little_for_each_other(lengths, packing, dp, accumulation):
    made = of_longalign(lengths, packing, dp, accumulation)
    assert made.imbalance().mean() < 1.02
    assert np.quantile(made.imbalance(), 0.95) < 1.05
    assert made.pack_costs == pytest.approx([costs_of(lengths[pack]).sum() for pack in made.packs])


def test_plain_order_would_make_them_wait(lengths):
    assert of_longalign(lengths, "none").imbalance().mean() > 1.3
    costs = np.random.default_rng(1).permutation(of_longalign(lengths, "best_fit").pack_costs)
    steps = costs[: len(costs) // 8 * 8].reshape(-1, 8)
    assert (steps.max(axis=1) / steps.mean(axis=1)).mean() > 1.1


@pytest.mark.parametrize("packing", ["best_fit", "sorted", "none"])
def test_place_in_the_epoch_tells_little_about_length(lengths, packing):
    for epoch in range(3):
        made = of_longalign(lengths, packing, 4, 1, epoch)
        mean_lengths = [lengths[pack].mean() for pack in made.packs]
        assert abs(np.corrcoef(np.arange(len(made.packs)), mean_lengths)[0, 1]) < 0.15


def test_large_steps_see_packs_of_every_cost(lengths):
    made = of_longalign(lengths, "best_fit", 8, 32)
    means = [made.pack_costs[list(made.packs_of_step(i))].mean() for i in range(len(made) - 1)]
    alike = of_longalign(lengths, "best_fit", 8, 4)
    assert np.std(means) < 0.6 * np.std([alike.pack_costs[i : i + 32].mean() for i in range(0, 1300, 32)])


def test_packs_are_new_ones_each_epoch(lengths):
    first, second = (
        {frozenset(pack.tolist()) for pack in of_longalign(lengths, "best_fit", epoch=e).packs} for e in (0, 1)
    )
    assert len(first & second) < 0.3 * len(first)


def test_sorted_packs_hold_rows_of_like_length(lengths):
    made = of_longalign(lengths, "sorted")
    ratios = [lengths[pack].max() / lengths[pack].min() for pack in made.packs if len(pack) > 1]
    assert np.quantile(ratios, 0.95) < 1.25


@given(st.lists(st.integers(1, BUDGET), max_size=60), st.integers(0, 9))
def test_next_fit_keeps_the_order(lengths, seed):
    array = np.asarray(lengths, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(array))
    groups = next_fit(array, BUDGET, order)
    assert [i for group in groups for i in group] == order.tolist()
    for group, after in itertools.pairwise(groups):
        assert array[group].sum() <= BUDGET < array[group].sum() + array[after[0]]


@pytest.mark.parametrize("packing", ["best_fit", "sorted", "none"])
def test_a_million_rows_take_seconds(packing):
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(7, 1.2, 1_000_000)), 16, 131072).astype(np.int64)
    start = time.process_time()
    made = plan_epoch(lengths, budget_tokens=131072, dp=8, accumulation=1, seed=0, epoch=0, packing=packing)
    assert time.process_time() - start < 10
    assert sum(map(len, made.packs)) == 1_000_000
