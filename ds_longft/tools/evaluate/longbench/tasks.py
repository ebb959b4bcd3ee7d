"""The 21 tasks of LongBench: language, group, length of the answer, metric; and the averages of the usual table.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding" (2023). Numbers as in its
official code. Prompt templates are not here: they are read from the user's copy (see `task_rows.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Metric = Literal["f1", "f1_zh", "rouge", "rouge_zh", "classification", "retrieval", "retrieval_zh", "count", "code"]

GROUPS = ("Single-Doc QA", "Multi-Doc QA", "Summarization", "Few-shot Learning", "Synthetic", "Code")
BUCKETS = ("0-4k", "4-8k", "8k+")
"""LongBench-E's lengths, by a row's `length` (words in English, characters in Chinese)."""


@dataclass(frozen=True)
class Task:
    """One data set of LongBench."""

    name: str
    language: Literal["en", "zh", "code"]
    group: str
    max_new_tokens: int
    metric: Metric
    first_line_only: bool = False  # few-shot tasks: the model goes on with the next example
    chat: bool = True  # whether the prompt is put into the chat template
    in_e: bool = False  # whether LongBench-E has it


def _tasks() -> tuple[Task, ...]:
    single, multi, summary, few, synthetic, code = GROUPS
    return (
        Task("narrativeqa", "en", single, 128, "f1"),
        Task("qasper", "en", single, 128, "f1", in_e=True),
        Task("multifieldqa_en", "en", single, 64, "f1", in_e=True),
        Task("multifieldqa_zh", "zh", single, 64, "f1_zh"),
        Task("hotpotqa", "en", multi, 32, "f1", in_e=True),
        Task("2wikimqa", "en", multi, 32, "f1", in_e=True),
        Task("musique", "en", multi, 32, "f1"),
        Task("dureader", "zh", multi, 128, "rouge_zh"),
        Task("gov_report", "en", summary, 512, "rouge", in_e=True),
        Task("qmsum", "en", summary, 512, "rouge"),
        Task("multi_news", "en", summary, 512, "rouge", in_e=True),
        Task("vcsum", "zh", summary, 512, "rouge_zh"),
        Task("trec", "en", few, 64, "classification", first_line_only=True, chat=False, in_e=True),
        Task("triviaqa", "en", few, 32, "f1", first_line_only=True, chat=False, in_e=True),
        Task("samsum", "en", few, 128, "rouge", first_line_only=True, chat=False, in_e=True),
        Task("lsht", "zh", few, 64, "classification", first_line_only=True, chat=False),
        Task("passage_count", "en", synthetic, 32, "count", in_e=True),
        Task("passage_retrieval_en", "en", synthetic, 32, "retrieval", in_e=True),
        Task("passage_retrieval_zh", "zh", synthetic, 32, "retrieval_zh"),
        Task("lcc", "code", code, 64, "code", chat=False, in_e=True),
        Task("repobench-p", "code", code, 64, "code", chat=False, in_e=True),
    )


TASKS: Mapping[str, Task] = {task.name: task for task in _tasks()}


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The columns of the table for the tasks that are there: each group in English and in Chinese, and the averages.

    `Average_en` is the mean over the English tasks without code (14 of them), not over groups; `Average_zh` over the
    Chinese ones; `Code` stands for itself. A column is left out where one of its tasks is missing: a mean over fewer
    tasks would be compared with a mean over all.
    """
    table: dict[str, float] = {}
    for language in ("en", "zh"):
        for group in GROUPS[:-1]:
            table |= _column(f"{group} {language}", [t for t in _of(language) if t.group == group], scores)
    table |= _column("Code", _of("code"), scores)
    table |= _column("Average_en", _of("en"), scores)
    return table | _column("Average_zh", _of("zh"), scores)


def _of(language: str) -> list[Task]:
    return [task for task in TASKS.values() if task.language == language]


def _column(name: str, tasks: Sequence[Task], scores: Mapping[str, float]) -> dict[str, float]:
    if any(task.name not in scores for task in tasks):
        return {}
    return {name: round(sum(scores[task.name] for task in tasks) / len(tasks), 2)}
