import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_longft.batch import IGNORE_INDEX
from ds_longft.data.pack import build_pack, filler_pack
from ds_longft.data.tokenized import TokenizedRow


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
