"""`ds-longft eval longbench score`: prediction rows of any model -> LongBench scores."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_longft.config.run_config import SourceConfig
from ds_longft.data.readers import read_rows
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError
from ds_longft.tools.evaluate.longbench.task_metrics import SCORERS
from ds_longft.tools.evaluate.longbench.tasks import BUCKETS, TASKS, Task, averages

REQUIRED = ("pred", "answers")


def score(predictions: str, *, by_length: bool = False, json: bool = False) -> None:
    """Score LongBench predictions, whoever made them.

    A row holds `dataset` (or the file is called after it, as in LongBench's own pred/ folders), `pred`, `answers`,
    `all_classes` (for trec and lsht) and `length` (for --by_length). Task scores are means over rows of the best score
    over a row's answers, times 100.

    Args:
        predictions: JSONL file (.gz too), or a folder of them.
        by_length: LongBench-E: also a score for each of 0-4k, 4-8k and 8k+ words.
        json: print one JSON object, {"scores": {task: value}, ...}, instead of a table.
    """
    rows = read_predictions(predictions)
    scores = task_scores(rows)
    result: dict[str, Any] = {"scores": scores, "averages": averages(scores)}
    result["rows"] = {task: sum(row["dataset"] == task for row in rows) for task in scores}
    if by_length:
        result["by_length"] = scores_by_length(rows)
    if json:
        print(json_text.dumps(result, ensure_ascii=False))
        return
    print_scores(result)


def read_predictions(path: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file or a folder of them, each with a known `dataset`.

    Raises:
        DataError: nothing readable; or every row that cannot be scored, with the reason (the first 10 of them).
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for origin, record in read_rows(SourceConfig(path=path)):
        if isinstance(record, BadRow):
            problems.append(f"{origin}: {record}")
            continue
        if set(record) == {"settings"}:  # first line of what `eval longbench run` writes
            continue
        file = Path(origin.rpartition(":")[0]).name
        row = {"dataset": file.partition(".")[0], **record}
        row["dataset"] = str(row["dataset"]).removesuffix("_e")
        if problem := _problem(row):
            problems.append(f"{origin}: {problem}")
        rows.append(row)
    if problems:
        more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError("rows that cannot be scored:\n" + "\n".join(f"  {p}" for p in problems[:10]) + more)
    if not rows:
        raise DataError(f"{path} holds no prediction rows")
    return rows


def _problem(row: dict[str, Any]) -> str | None:
    if row["dataset"] not in TASKS:
        return f"dataset is {row['dataset']!r}, expected one of {', '.join(TASKS)}"
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        return f"no {' and no '.join(missing)} (keys: {', '.join(row)})"
    if not isinstance(row["pred"], str):
        return f"pred is {type(row['pred']).__name__}, expected text"
    answers = row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        return "answers should be a list of texts"
    if TASKS[row["dataset"]].metric == "classification" and not row.get("all_classes"):
        return f"all_classes is missing: {row['dataset']} is scored by the names of all classes"
    return None


def row_score(task: Task, row: dict[str, Any]) -> float:
    """Best score of the prediction over the row's answers, 0 to 1."""
    prediction = row["pred"]
    if task.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    classes = row.get("all_classes") or []
    return max(SCORERS[task.metric](prediction, answer, classes) for answer in row["answers"])


def task_scores(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """100 x mean row score of each task, 2 decimals, in the order of `TASKS`."""
    return {task: _percent(values) for task, values in _row_scores(rows).items()}


def scores_by_length(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """LongBench-E: the same for each bucket of `length`; buckets without rows are left out."""
    result: dict[str, dict[str, float]] = {}
    held = list(rows)
    for bucket in BUCKETS:
        for task, value in task_scores(row for row in held if _bucket(row) == bucket).items():
            result.setdefault(task, {})[bucket] = value
    return result


def _row_scores(rows: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["dataset"], []).append(row_score(TASKS[row["dataset"]], row))
    return {task: values[task] for task in TASKS if task in values}


def _bucket(row: dict[str, Any]) -> str | None:
    length = row.get("length")
    if not isinstance(length, int | float):
        raise DataError(f"length is {length!r} in a row of {row['dataset']}: --by_length needs a number in every row")
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def _percent(values: list[float]) -> float:
    return round(100 * sum(values) / len(values), 2)


def print_scores(result: dict[str, Any]) -> None:
    """Tables for people."""
    console = Console()
    table = Table("task", "group", "rows", "score", *(BUCKETS if "by_length" in result else ()))
    for task, value in result["scores"].items():
        lengths = result.get("by_length", {}).get(task, {})
        columns = [f"{lengths[b]:.2f}" if b in lengths else "" for b in BUCKETS] if "by_length" in result else []
        table.add_row(task, TASKS[task].group, str(result["rows"][task]), f"{value:.2f}", *columns)
    console.print(table)
    if result["averages"]:
        table = Table("column", "mean of tasks")
        for name, value in result["averages"].items():
            table.add_row(name, f"{value:.2f}")
        console.print(table)
