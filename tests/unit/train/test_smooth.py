"""Means over steps."""

import numpy as np
import pytest

from ds_longft.train.smooth import first_and_last, running_mean, steps_of_a_mean


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (2, 1), (9, 3), (30, 10), (100, 10), (200, 10), (1000, 50)])
def test_a_twentieth_of_the_steps_but_ten_at_least(steps: int, count: int) -> None:
    assert steps_of_a_mean(steps) == count
    assert first_and_last(list(range(steps))) == (count, (count - 1) / 2, steps - 1 - (count - 1) / 2)


@pytest.mark.parametrize("count", [1, 4, 5, 40])
def test_running_means_stand_at_the_middle_and_leave_out_what_is_not_finite(count: int) -> None:
    rng = np.random.default_rng(0)
    points = [(step, float(y)) for step, y in enumerate(rng.normal(size=40))]
    found = running_mean([*points[:7], (6.5, float("nan")), *points[7:]], count)
    assert [x for x, _ in found] == list(range((count - 1) // 2, (count - 1) // 2 + 41 - count))
    expected = np.convolve([y for _, y in points], np.ones(count) / count, mode="valid")
    np.testing.assert_allclose([y for _, y in found], expected, atol=1e-12)
    assert running_mean(points, 41) == []
