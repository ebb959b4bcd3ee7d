"""The time that is left, as it is said of rows that come in handfuls."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_longft.tools.evaluate import results
from ds_longft.tools.evaluate.results import Rows


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(results.time, "monotonic", lambda: now[0])
    return now


def said(
    rows: Rows, clock: list[float], handfuls: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """What is said as the first of each handful comes: (seconds waited for it, rows of it), a millisecond apart."""
    texts: list[str] = []
    monkeypatch.setattr(rows._bar, "update", lambda done, text: texts.append(text))
    firsts = []
    for wait_s, count in handfuls:
        clock[0] += wait_s
        for i in range(count):
            clock[0] += 0.001
            rows.add({"key": str(len(rows.rows))})
            firsts += texts[-1:] if i == 0 else []
    return firsts


def test_time_left_counts_whole_handfuls_and_no_start(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(tmp_path, "ruler", {}, total=156, show=False)
    firsts = said(rows, clock, [(22, 48), (10, 48), (10, 48)], monkeypatch)
    assert firsts[0] == "1 of 156"  # nothing is known: with the start it would be an hour
    assert firsts[1] == "49 of 156, about 49 s left"  # 22 s for 48
    assert firsts[2] == "97 of 156, about 12 s left"  # 10 s for 48


def test_time_left_of_rows_that_come_one_by_one(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(tmp_path, "ruler", {}, total=100, show=False)
    rows.add({"key": "earlier"})
    rows.close()
    again = Rows(tmp_path, "ruler", {}, total=100, show=False)
    slow = said(again, clock, [(30, 1), (2, 1), (2, 1), (2, 1)], monkeypatch)
    assert slow[-1] == "5 of 100, about 3 min left"  # 95 rows of 2 s
    quick = said(again, clock, [(0.1, 1)] * 40, monkeypatch)
    assert quick[-1] == "45 of 100, about 13 s left"  # rows 3 to 44 took 6 s and 39 times 0.101 s; 55 are left


def test_quick_rows_have_an_estimate(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(tmp_path, "score", {}, total=1000, show=False)
    texts = said(rows, clock, [(5, 1), *[(0.009, 1)] * 399], monkeypatch)
    assert texts[-1] == "400 of 1000, about 6 s left"
