"""The needles' grid: which questions are asked, in which batches, and what the answers come to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ds_longft.tools.evaluate.needle_facts import Form, Needle, judge
from ds_longft.tools.evaluate.texts import Language

ANSWER_TOKENS = 40  # of each number asked for: a short sentence around it is no mistake


@dataclass(frozen=True)
class Ask:
    """One question of the grid."""

    language: Language
    length_tokens: int
    depth: float | None  # None: the sentences lie all over the text
    trial: int

    @property
    def key(self) -> str:
        """Names its row."""
        place = "-" if self.depth is None else f"{self.depth:g}"
        return f"{self.language}/{self.length_tokens}/{place}/{self.trial}"


@dataclass(frozen=True)
class Grid:
    """What is asked."""

    form: Form
    facts: int
    sizes: list[int] | None  # prompt lengths; None: by the model's window
    depths: list[float | None]
    trials: int
    languages: list[Language]
    files: dict[str, str | None]  # to hide in, by language
    where: str | None
    seed: int

    def asks(self, sizes: Sequence[int]) -> list[Ask]:
        """Every question."""
        cells = product(self.languages, sizes, self.depths, range(self.trials))
        return [Ask(language, size, depth, trial) for language, size, depth, trial in cells]

    def settings(self, sizes: Sequence[int], texts_fingerprint: str) -> dict[str, Any]:
        """What decides the questions and how answers are judged."""
        return {
            "form": self.form,
            "facts": 1 if self.form == "single" else self.facts,
            "lengths": sizes,
            "depths": self.depths,
            "trials": self.trials,
            "languages": self.languages,
            "haystacks": {language: self.files[language] or "built in" for language in self.languages},
            "texts_fingerprint": texts_fingerprint,
            "where": self.where,
            "seed": self.seed,
            "answer_tokens": ANSWER_TOKENS,
        }


def spread(count: int, rng: random.Random) -> list[float]:
    """One place in each of `count` equal parts of the text."""
    return [(i + rng.random()) / count for i in range(count)]


def judged(ask: Ask, stands_at: Sequence[float], hidden: Needle, reply: str, seconds: float) -> dict[str, Any]:
    """The row of an answered question."""
    exact, share = judge(hidden.answers, reply)
    return {
        "language": ask.language,
        "length_tokens": ask.length_tokens,
        "depth": ask.depth,
        "stands_at": [round(d, 4) for d in stands_at],
        "hidden": list(hidden.sentences),
        "question": hidden.question.strip(),
        "answers": list(hidden.answers),
        "reply": reply,
        "exact": exact,
        "found_share": round(share, 4),
        "seconds": seconds,
    }


def summarize(
    rows: Sequence[dict[str, Any]], sizes: Sequence[int], depths: Sequence[float | None], languages: Sequence[str]
) -> dict[str, Any]:
    """Exact answers in percent: by language and length, and the grid by depth (rows) and length (columns)."""
    by_length: dict[str, dict[str, float]] = {}
    found: dict[str, dict[str, float]] = {}
    grid: dict[str, list[list[float]]] = {}
    for language in languages:
        mine = [row for row in rows if row["language"] == language]
        of_length = {size: [row for row in mine if row["length_tokens"] == size] for size in sizes}
        by_length[language] = {str(size): _percent([r["exact"] for r in of_length[size]]) for size in sizes}
        found[language] = {str(size): _percent([r["found_share"] for r in of_length[size]]) for size in sizes}
        grid[language] = [
            [_percent([r["exact"] for r in of_length[size] if r["depth"] == depth]) for size in sizes]
            for depth in depths
        ]
    return {"exact_percent": by_length, "found_percent": found, "grid": grid, "lengths": sizes, "depths": depths}


def samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some rows to read: the longest prompts, wrong answers first."""
    keys = ("language", "length_tokens", "stands_at", "hidden", "question", "answers", "reply", "exact")
    chosen = sorted(rows, key=lambda row: (row["exact"], -row["length_tokens"]))
    wrong = [row for row in chosen if not row["exact"]][:4]
    right = [row for row in chosen if row["exact"]][:4]
    return [{key: row[key] for key in keys} for row in wrong + right]


def default_lengths(window: int | None) -> list[int]:
    """The window and four halvings of it, not below 1K."""
    largest = window or 8192
    return sorted({max(1024, largest >> i) for i in range(5)})


def _percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 1) if values else 0.0
