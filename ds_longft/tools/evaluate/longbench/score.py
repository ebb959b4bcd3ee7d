"""`ds-longft eval longbench score`: prediction rows of any model -> LongBench scores."""

from __future__ import annotations

import json as json_text
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.readers import read_rows
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError
from ds_longft.tools.evaluate.longbench.tasks import BUCKETS, TASKS, Task, averages, classification


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
    result = scored(read_predictions(predictions), by_length)
    if json:
        print(json_text.dumps(result, ensure_ascii=False))
    else:
        print_scores(result)


def scored(rows: Sequence[dict[str, Any]], by_length: bool) -> dict[str, Any]:
    """Scores of the tasks, the averages of the table, rows of each task; for LongBench-E scores by length too."""
    scores, counts = task_scores(rows), Counter(row["dataset"] for row in rows)
    result = {"scores": scores, "averages": averages(scores), "rows": {task: counts[task] for task in scores}}
    return result | ({"by_length": scores_by_length(rows)} if by_length else {})


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
    missing = [key for key in ("pred", "answers") if key not in row]
    if missing:
        return f"no {' and no '.join(missing)} (keys: {', '.join(row)})"
    if not isinstance(row["pred"], str):
        return f"pred is {type(row['pred']).__name__}, expected text"
    answers = row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        return "answers should be a list of texts"
    if TASKS[row["dataset"]].metric is classification and not row.get("all_classes"):
        return f"all_classes is missing: {row['dataset']} is scored by the names of all classes"
    return None


def row_score(task: Task, row: dict[str, Any]) -> float:
    """Best score of the prediction over the row's answers, 0 to 1."""
    prediction = row["pred"]
    if task.first_line_only:
        prediction = prediction.lstrip("\n").split("\n")[0]
    classes = row.get("all_classes") or []
    return max(task.metric(prediction, answer, classes) for answer in row["answers"])


def task_scores(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """100 x mean row score of each task, 2 decimals, in the order of `TASKS`."""
    values: dict[str, list[float]] = {task: [] for task in TASKS}
    for row in rows:
        values[row["dataset"]].append(row_score(TASKS[row["dataset"]], row))
    return {task: round(100 * sum(of) / len(of), 2) for task, of in values.items() if of}


def scores_by_length(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """LongBench-E: the same for each bucket of `length`; buckets without rows are left out."""
    of_bucket: dict[str, list[dict[str, Any]]] = {bucket: [] for bucket in BUCKETS}
    for row in rows:
        length = row.get("length")
        if not isinstance(length, int | float):
            told = f"length is {length!r} in a row of {row['dataset']}"
            raise DataError(f"{told}: --by_length needs a number in every row")
        of_bucket[BUCKETS[(length >= 4000) + (length >= 8000)]].append(row)
    result: dict[str, dict[str, float]] = {}
    for bucket, held in of_bucket.items():
        for task, value in task_scores(held).items():
            result.setdefault(task, {})[bucket] = value
    return result


def print_scores(result: dict[str, Any]) -> None:
    """Tables for people."""
    console, lengths = Console(), result.get("by_length")
    table = Table("task", "group", "rows", "score", *(BUCKETS if lengths else ()))
    for task, value in result["scores"].items():
        cells = [f"{lengths[task][b]:.2f}" if b in lengths[task] else "" for b in BUCKETS] if lengths else []
        table.add_row(task, TASKS[task].group, str(result["rows"][task]), f"{value:.2f}", *cells)
    console.print(table)
    if result["averages"]:
        table = Table("column", "mean of tasks")
        for name, value in result["averages"].items():
            table.add_row(name, f"{value:.2f}")
        console.print(table)
