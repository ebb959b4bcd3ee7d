import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_longft.errors import DataError
from ds_longft.tools.make_data.quota import Margin, partition, quotas

LANGUAGES = ["zh", "en", "zh", "en"]
SOURCES = ["a", "a", "b", "b"]


def test_as_many_as_the_shares_allow():
    available = np.asarray([100, 900, 400, 300])
    take = quotas(available, partition("languages", LANGUAGES, {"zh": 0.1}), None)
    assert take[[1, 3]].sum() == pytest.approx(1200, abs=3), "all English there is"
    assert take[[0, 2]].sum() == pytest.approx(133, abs=3)
    assert take[2] / take[0] == pytest.approx(4, abs=0.2), "in the proportions of the pool"
    assert quotas(available, partition("languages", LANGUAGES, {"zh": 0.1}), 500).sum() == pytest.approx(500, abs=1)


def test_rows_are_a_limit_shares_a_promise():
    available = np.asarray([1000, 9000, 1000, 9000])
    margins = [Margin("source b", np.asarray([s == "b" for s in SOURCES]), most=500)]
    margins += partition("languages", LANGUAGES, {"zh": 0.5})
    take = quotas(available, margins, None)
    assert take[2:].sum() <= 500
    assert take[[0, 2]].sum() == pytest.approx(take.sum() / 2, rel=0.01)
    assert take.sum() > 2000


def test_shares_of_several_kinds_hold_together():
    rng = np.random.default_rng(0)
    cells = [(s, lang, band) for s in "abc" for lang in ("zh", "en") for band in ("short", "long")]
    available = rng.integers(50, 2000, len(cells))
    margins = partition("sources", [c[0] for c in cells], {"a": 0.5, "b": 0.2})
    margins += partition("languages", [c[1] for c in cells], {"zh": 0.1})
    margins += partition("lengths", [c[2] for c in cells], {"short": 0.3})
    take = quotas(available, margins, None)
    assert (take <= available).all()
    for margin in margins:
        assert take[margin.cells].sum() == pytest.approx(margin.share * take.sum(), abs=0.005 * take.sum() + 1)
    assert take.sum() > 100


def test_wishes_nobody_can_meet_are_named():
    with pytest.raises(DataError, match="languages: no usable row is fr; seen are en, zh"):
        partition("languages", LANGUAGES, {"fr": 0.5})
    with pytest.raises(DataError, match=r"add up to 0\.500.*make it 1"):
        partition("languages", LANGUAGES, {"zh": 0.2, "en": 0.3})
    margins = partition("sources", ["a", "b"], {"a": 0.9}) + partition("languages", ["zh", "en"], {"zh": 0.1})
    with pytest.raises(DataError, match="cannot be met together"):
        quotas(np.asarray([10, 10]), margins, None)


def test_shares_that_add_up_to_one_but_for_rounding():
    shares = {"a": 0.13, "b": 0.12, "c": 0.43, "d": 0.24, "e": 0.08}  # 1 - 1.1e-16
    assert 0 < 1 - sum(shares.values()) < 1e-15
    assert quotas(np.full(5, 1000), partition("sources", list(shares), shares), 100).tolist() == [13, 12, 43, 24, 8]


@settings(max_examples=50, deadline=None)
@given(
    available=st.lists(st.integers(0, 500), min_size=4, max_size=4),
    share=st.floats(0.05, 0.95),
    total=st.none() | st.integers(1, 800),
)
def test_never_more_than_there_is(available, share, total):
    cells = np.asarray(available)
    try:
        take = quotas(cells, partition("languages", LANGUAGES, {"zh": share}), total)
    except DataError:
        assert cells[[0, 2]].sum() == 0 or cells[[1, 3]].sum() == 0 or cells.sum() < 40
        return
    assert ((take >= 0) & (take <= cells)).all()
    assert take.sum() <= (total or cells.sum())
    assert abs(take[[0, 2]].sum() - share * take.sum()) <= 0.01 * take.sum() + 2
