"""LongBench's scores: what its own code gives for the same predictions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ds_longft.cli import main
from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.longbench import predictions
from ds_longft.tools.evaluate.longbench.predictions import choose_tasks, prompt_ids, read_task
from ds_longft.tools.evaluate.longbench.score import read_predictions, row_score, scores_by_length, task_scores
from ds_longft.tools.evaluate.longbench.tasks import TASKS, averages
from ds_longft.tools.evaluate.processes import Processes
from tests.tokenizer import tiny_tokenizer

pytest.importorskip("rouge")
pytest.importorskip("jieba")
pytest.importorskip("fuzzywuzzy")

SHARED = os.environ.get("DS_LONGFT_TEST_DATA", "")


def row(dataset: str, pred: str, *answers: str, **more: Any) -> dict[str, Any]:
    return {"dataset": dataset, "pred": pred, "answers": list(answers), **more}


@pytest.fixture(scope="module")
def fixture_rows() -> list[dict[str, Any]]:
    if not SHARED:
        pytest.skip("DS_LONGFT_TEST_DATA names no folder with longbench_scorer_fixture")
    return read_predictions(f"{SHARED}/longbench_scorer_fixture.jsonl.gz")


COVERED = ["gov_report", "hotpotqa", "lcc", "multifieldqa_en", "musique", "narrativeqa", "passage_retrieval_en", "qmsum",
           "samsum", "triviaqa"]  # fmt: skip
SLOW = {"gov_report"}  # ROUGE of 200 summaries of 500 words: half a minute


@pytest.mark.parametrize("task", [pytest.param(t, marks=pytest.mark.slow if t in SLOW else ()) for t in COVERED])
def test_published_scores_of_real_predictions(fixture_rows: list[dict[str, Any]], task: str) -> None:
    """LongAlpaca-7B-16k's own predictions, to the second decimal."""
    expected = json.loads((Path(SHARED) / "longbench_scorer_fixture.expected.json").read_text())
    assert task_scores(r for r in fixture_rows if r["dataset"] == task) == {task: expected["scores"][task]}


LSHT = ["教育", "体育", "体育竞赛", "财经"]


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (row("multifieldqa_zh", "北京大学。", "北京大学"), 1.0),  # punctuation does not count
        (row("multifieldqa_zh", "他毕业于清华大学", "清华大学"), 0.4),  # 他 毕业 于 清华大学: 1 of 4, 1 of 1
        (row("dureader", "今天天气很好", "今天天气很好"), 1.0),
        (row("dureader", "", "今天天气很好"), 0.0),  # rouge refuses it
        (row("vcsum", "会议讨论了预算", "会议讨论了人事"), 0.75),  # three of four words in order, both ways
        (row("lsht", "体育\n其他", "体育", all_classes=LSHT), 1.0),  # the first line only
        (row("lsht", "教育和财经", "财经", all_classes=LSHT), 0.5),  # two classes named
        (row("lsht", "体育竞赛", "体育竞赛", all_classes=LSHT), 1.0),  # 体育 is part of the answer: removed
        (row("lsht", "财经", "教育", all_classes=LSHT), 0.0),
        (row("passage_retrieval_zh", "段落3", "段落3"), 1.0),
        (row("passage_retrieval_zh", "答案是段落3或段落13", "段落3"), 0.5),
        (row("passage_retrieval_zh", "不知道", "段落3"), 0.0),
        (row("passage_retrieval_en", "Paragraph 12", "Paragraph 12"), 1.0),
        (row("passage_count", "There are 3, 5 or 3.", "3"), 2 / 3),
        (row("hotpotqa", "The Eiffel-Tower!", "eiffeltower", "Louvre"), 1.0),  # the best of the answers
        (row("qasper", "", "a cat"), 0.0),
        (row("lcc", "# a comment\n```\nreturn x\nmore", "return x"), 1.0),
        (row("lcc", "return y", "return x"), 0.88),  # whole percent
        (row("triviaqa", "\n\nParis\nQuestion: next", "Paris"), 1.0),
        (row("trec", "Other location", "Other location", all_classes=["Other location", "location", "City"]), 1.0),
    ],
)  # fmt: skip
def test_rows(one: dict[str, Any], expected: float) -> None:
    assert row_score(TASKS[one["dataset"]], one) == pytest.approx(expected)


def test_classes_are_removed_as_published() -> None:
    """The official loop removes from the list it walks over, and so misses the class after one it removed."""
    names = ["a", "ab", "abc"]
    assert row_score(TASKS["trec"], row("trec", "abc", "abc", all_classes=names)) == 0.5


def test_averages_are_means_of_tasks_and_wait_for_all_of_them() -> None:
    """The article's card: 36.7071 is the mean over 14 English tasks, not over five groups."""
    groups = {"Single-Doc QA": 60.6, "Multi-Doc QA": 22.8, "Summarization": 30.9, "Few-shot Learning": 38.9}
    scores = {t.name: groups.get(t.group, 25.8) for t in TASKS.values() if t.language == "en"}
    found = averages(scores)
    weighted = (3 * 60.6 + 3 * 22.8 + 3 * 30.9 + 3 * 38.9 + 2 * 25.8) / 14
    assert found["Average_en"] == round(weighted, 2)
    assert found["Single-Doc QA en"] == 60.6
    assert "Average_zh" not in found
    assert "Code" not in found
    del scores["musique"]
    assert "Average_en" not in averages(scores)
    assert [sum(t.language == lang for t in TASKS.values()) for lang in ("en", "zh", "code")] == [14, 5, 2]
    assert sum(t.in_e for t in TASKS.values()) == 13


def test_score_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "anyone.jsonl"
    rows = [
        row("hotpotqa", "Paris", "Paris", length=3000),
        row("hotpotqa", "Rome", "Paris", length=9000),
        row("lcc", "x = 1", "x = 1", length=5000),
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["eval", "longbench", "score", "--predictions", str(file), "--json", "--by_length"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["scores"] == {"hotpotqa": 50.0, "lcc": 100.0}
    assert result["by_length"]["hotpotqa"] == {"0-4k": 100.0, "8k+": 0.0}


def test_files_named_after_their_task(tmp_path: Path) -> None:
    """LongBench's own pred/ folders say the task in the file's name alone."""
    folder = tmp_path / "pred"
    folder.mkdir()
    one = {"pred": "Paris", "answers": ["Paris"], "all_classes": None, "length": 10}
    (folder / "hotpotqa_e.jsonl").write_text(json.dumps(one) + "\n")
    (folder / "samsum.jsonl").write_text(json.dumps(one) + "\n")
    assert task_scores(read_predictions(str(folder))) == {"hotpotqa": 100.0, "samsum": 100.0}


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (row("hotpot", "a", "b"), "dataset is 'hotpot'"),
        ({"dataset": "lcc", "pred": "a"}, "no answers"),
        (row("lcc", "a") | {"answers": "a"}, "answers should be a list"),
        (row("trec", "a", "b"), "all_classes is missing"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path: Path, one: dict[str, Any], said: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(row("lcc", "a", "a")) + "\n" + json.dumps(one) + "\n")
    with pytest.raises(DataError, match=said) as error:
        read_predictions(str(file))
    assert f"{file}:2" in str(error.value)


def test_by_length_needs_lengths() -> None:
    with pytest.raises(DataError, match="length is None"):
        scores_by_length([row("lcc", "a", "a")])


def test_the_middle_is_cut_before_the_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    text = "".join(f"line {i} of the text\n" for i in range(200))
    cut = prompt_ids(tokenizer, text, TASKS["hotpotqa"], 100)
    shown = tokenizer.decode(cut)
    assert shown.count("<|im_start|>") == 3  # system, user, and the assistant's turn that is to come
    plain = prompt_ids(tokenizer, text, TASKS["lcc"], 100)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(plain) == tokenizer.decode(ids[:50]) + tokenizer.decode(ids[-50:])
    assert tokenizer.decode(plain) in shown
    assert prompt_ids(tokenizer, "short", TASKS["lcc"], 100) == tokenizer("short")["input_ids"]


def test_rows_of_any_copy(tmp_path: Path) -> None:
    one = {"question": "who?", "context": "a\u2028b\x85c", "answers": ["x"], "all_classes": None}
    for name in ("hotpotqa", "trec"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(one, ensure_ascii=False) + "\n", encoding="utf-8")
    (row,) = read_task(tmp_path, TASKS["hotpotqa"], e=False)
    assert (row["input"], row["context"]) == ("who?", "a\u2028b\x85c")
    with pytest.raises(DataError, match="row 1 has no all_classes"):
        read_task(tmp_path, TASKS["trec"], e=False)
    (tmp_path / "hotpotqa_e.jsonl").write_text(json.dumps({"context": "a", "answers": ["x"]}) + "\n")
    with pytest.raises(DataError, match="row 1 has no input and no length"):
        read_task(tmp_path, TASKS["hotpotqa"], e=True)


def test_one_process_unpacks_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(processes: Processes, work: Any) -> None:
        raise DataError("rank 0 does it")

    monkeypatch.setattr(Processes, "first", first)
    monkeypatch.setattr(predictions, "find_copy", lambda _: pytest.fail("every rank does it"))
    with pytest.raises(DataError, match="rank 0 does it"):
        predictions.run("no model")


def test_tasks_by_name() -> None:
    assert [t.name for t in choose_tasks("lcc,hotpotqa", e=False)] == ["hotpotqa", "lcc"]
    assert len(choose_tasks("all", e=True)) == 13
    with pytest.raises(ConfigError, match="no task hotpot"):
        choose_tasks("hotpot", e=False)
    with pytest.raises(ConfigError, match="LongBench-E has"):
        choose_tasks("zh", e=True)
