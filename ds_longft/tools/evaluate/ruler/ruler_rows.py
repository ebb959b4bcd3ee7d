"""RULER's thirteen tasks as a table, the largest text of each that fits a length, and the score of an answer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.flags import listed
from ds_longft.tools.evaluate.haystack import encode_prompt, fitted
from ds_longft.tools.evaluate.needle_facts import make_needle
from ds_longft.tools.evaluate.ruler.texts_of_tasks import (
    HOPS,
    Niah,
    Question,
    Text,
    common_words,
    frequent_words,
    plain_words,
    question_answering,
    tracking,
    with_example,
)

EXAMPLE_TOKENS = 500  # of variable tracking's example, answer included
OWN_WORDS = 50  # of a piece of our own documents; those that tell something have two
NIAH: Mapping[str, Niah] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", value_kind="uuids"),
    "niah_multikey_1": Niah("essay", keys=4),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Niah("essay", values=4),
    "niah_multiquery": Niah("essay", queries=4),
}
ANSWER_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
OWN = {"qa_1": "own_qa_1", "qa_2": "own_qa_2"}
"""Questions about documents made here, where no copy of SQuAD or HotpotQA is given: another task, so another name."""


@dataclass(frozen=True)
class Material:
    """What texts are made of beside what is drawn."""

    essay: Sequence[str]  # words
    questions: Mapping[str, Sequence[Question]]  # by task
    documents: Mapping[str, Sequence[str]]
    example: Text | None = None  # of variable tracking

    def text(self, task: str, units: int, length_tokens: int, row: int, rng: random.Random) -> Text:
        """The row of a task with this number of units: words, sentences or documents."""
        if task in NIAH:
            return NIAH[task].text(units, self.essay, rng)
        if task == "vt":
            assert self.example is not None
            return with_example(self.example, tracking(units, rng), rng)
        if task == "cwe":
            return common_words(units, length_tokens, rng)
        if task == "fwe":
            return frequent_words(units, length_tokens, rng)
        if task in OWN.values():
            question, documents = _own(task, self.essay, rng)
        else:
            question, documents = self.questions[task][row], list(self.documents[task])
        return question_answering(question, documents, units, rng)


def choose(names: str, files: Mapping[str, str | None]) -> list[str]:
    """Tasks by name, or all 13. `files`: of qa_1 and qa_2, those that are given.

    Raises:
        ConfigError: an unknown name, or one whose file is not given.
        LongftError: tasks draw words, and the package that has them is not installed.
    """
    there = [name if name not in OWN or files[name] else OWN[name] for name in ANSWER_TOKENS]
    wanted = listed(names)
    unknown = [name for name in wanted if name not in (*there, "all")]
    if unknown or not wanted:
        raise ConfigError(
            f"--tasks: no task {', '.join(unknown) or names!r}; there are all, {', '.join(there)}"
            + ("" if all(files.values()) else "; qa_1 is there with --squad, qa_2 with --hotpotqa")
        )
    chosen = [name for name in there if {"all", name} & set(wanted)]
    if {"cwe", *NIAH} & set(chosen):
        plain_words()  # what is missing is said before a model is loaded
    return chosen


def answer_tokens(task: str) -> int:
    """How many tokens an answer may have, as published."""
    return ANSWER_TOKENS[task.removeprefix("own_")]


def read_material(
    tokenizer: Any, essays: Sequence[str], files: Mapping[str, str | None], tasks: Sequence[str]
) -> Material:
    """Raises DataError: a file is no copy of its set."""
    readers = {"qa_1": _squad, "qa_2": _hotpotqa}
    read = {task: readers[task](Path(file).expanduser()) for task, file in files.items() if file and task in tasks}
    example = None
    if "vt" in tasks:

        def build(units: int) -> Text:
            return tracking(units, random.Random("example"), letters=3)

        def ids_of(text: Text) -> list[int]:
            return list(tokenizer(f"{text.asked} {text.begins}", verbose=False)["input_ids"])

        shortest = len(ids_of(build(HOPS + 2)))
        most = max(EXAMPLE_TOKENS - ANSWER_TOKENS["vt"], shortest)
        example, _ = fitted(build, ids_of, most, HOPS + 2, what="an example")
    words = " ".join(essays).split()
    return Material(words, {t: q for t, (q, _) in read.items()}, {t: d for t, (_, d) in read.items()}, example)


def made_row(
    tokenizer: Any, material: Material, task: str, length_tokens: int, row: int, seed: int
) -> tuple[Text, list[int]]:
    """The row and its prompt's token ids: with the answer at most `length_tokens`, and no room for a unit more.

    Raises:
        ConfigError: not even the smallest text of the task fits.
    """

    def build(units: int) -> Text:
        return material.text(task, units, length_tokens, row, random.Random(f"{seed} {task} {length_tokens} {row}"))

    least = {"cwe": 20, "fwe": 60}.get(task, 10)
    if task in material.questions:
        least = len(material.questions[task][row].documents)
    elif task in OWN.values():
        least = 2
    return fitted(
        build,
        lambda text: encode_prompt(tokenizer, text.asked, begins=text.begins.strip()),
        length_tokens,
        least,
        answer_tokens=answer_tokens(task),
        what=task,
    )


def score(task: str, wanted: Sequence[str], reply: str) -> float:
    """Share of the wanted strings that the reply holds, case aside; of answers out of documents one is enough."""
    said = re.sub(r"[\x00-\x1f]", "\n", reply.strip()).strip().lower()
    found = [answer.lower() in said for answer in wanted]
    return float(any(found)) if "qa" in task else sum(found) / len(found)


def _own(task: str, words: Sequence[str], rng: random.Random) -> tuple[Question, list[str]]:
    """A number that one document tells, or that two tell together, among pieces of the essay."""
    needle = make_needle("single" if task == "own_qa_1" else "hop", "en", 2, rng)
    pieces = [" ".join(words[i : i + OWN_WORDS]) for i in range(0, len(words), OWN_WORDS)]
    gold = [f"{rng.choice(pieces)} {sentence} {rng.choice(pieces)}" for sentence in needle.sentences]
    at = range(len(pieces), len(pieces) + len(gold))
    return Question(needle.question.strip(), needle.answers, tuple(at)), pieces + gold


def _squad(file: Path) -> tuple[list[Question], list[str]]:
    data = _read(file)
    try:
        articles = [article["paragraphs"] for article in data["data"]]
        documents = sorted({p["context"] for article in articles for p in article})
        at = {document: i for i, document in enumerate(documents)}
        questions = [
            Question(
                qa["question"],
                tuple(answer["text"] for answer in qa["answers"]),
                (at[p["context"]],),
                tuple(at[q["context"]] for q in article if q["context"] != p["context"]),
            )
            for article in articles
            for p in article
            for qa in p["qas"]
            if not qa.get("is_impossible", False)
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"--squad: {file} is no SQuAD file: {error!r}; expected dev-v2.0.json or its like") from None
    return questions, documents


def _hotpotqa(file: Path) -> tuple[list[Question], list[str]]:
    data = _read(file)
    try:
        of_row = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in data]
        documents = sorted({document for row in of_row for document in row})
        at = {document: i for i, document in enumerate(documents)}
        questions = [
            Question(row["question"], (row["answer"],), tuple(at[d] for d in mine))
            for row, mine in zip(data, of_row, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        told = "expected hotpot_dev_distractor_v1.json or its like"
        raise DataError(f"--hotpotqa: {file} is no HotpotQA file: {error!r}; {told}") from None
    return questions, documents


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from None
