"""`ds-longft eval short`: what long training must not harm. Short questions by generation, and the loss on short texts.

A model that was stretched and trained on long samples alone may forget how to be short. Compare a run with what it
started from (--before): the loss should rise by 0.05 at most, and the same questions should be answered.
"""

from __future__ import annotations

import random
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.evaluation import Made, Question, Result, Row, evaluate_on_ranks, fingerprint
from ds_longft.tools.evaluate.flags import FLAGS, Flags, positive, print_tables
from ds_longft.tools.evaluate.texts import CHARACTERS_A_TOKEN, Language, read_texts

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

ANSWER_TOKENS = 32
QUESTION_TOKENS = 2048  # more than a question and a chat template have; questions of so many tokens are one batch
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid", "Germany": "Berlin",
    "Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Cuba": "Havana", "Norway": "Oslo", "Poland": "Warsaw", "Ireland": "Dublin", "Peru": "Lima",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "black": "white", "day": "night", "fast": "slow", "old": "young",
    "open": "closed", "left": "right", "early": "late", "wet": "dry", "full": "empty",
}  # fmt: skip
FOLLOWING = {
    "Monday": "Tuesday", "Wednesday": "Thursday", "Friday": "Saturday", "March": "April", "June": "July", "May": "June",
    "September": "October", "January": "February",
}  # fmt: skip


def questions() -> list[tuple[str, str]]:
    """Question and the word or number that a right answer holds; the same 60 every time."""
    rng = random.Random(0)
    asked = [(f"What is the capital of {land}?", city) for land, city in CAPITALS.items()]
    asked += [(f"What is the opposite of the word '{word}'?", other) for word, other in OPPOSITES.items()]
    asked += [(f"Which one comes right after {name}?", after) for name, after in FOLLOWING.items()]
    for _ in range(12):
        a, b = rng.randrange(2, 20), rng.randrange(2, 20)
        asked.append((f"What is {a} + {b}? Answer with the number only.", str(a + b)))
    for _ in range(12):
        word = "".join(rng.sample("bcdfghklmnprst", 5))
        asked.append((f"Repeat this word exactly, and nothing else: {word}", word))
    return asked


def short(
    model: str,
    *,
    text: str | None = None,
    where: str | None = None,
    texts: int = 64,
    length: int = 512,
    language: Language = "en",
    flags: Flags = FLAGS,
) -> None:
    """Ask 60 short questions and measure the loss on short texts.

    Args:
        text: text file, JSONL or folder for the loss. Left out: the Python documentation of this machine.
        where: column=value, rows to take.
        texts: how many short texts.
        length: tokens of each.
        language: of the built-in text.
    """
    arguments = dict(locals())
    positive(texts=texts)
    if length < 2:
        raise ConfigError(f"--length is {length}: expected 2 or more")
    told = {"text": text, "where": where, "language": language}
    evaluate_on_ranks("eval short", arguments, lambda answering: _measure(answering, told, texts, length), _show)


def _measure(answering: Answering, told: dict[str, Any], texts: int, length: int) -> Result:
    from ds_longft.tools.evaluate.haystack import MARK, chat_around
    from ds_longft.tools.evaluate.perplexity import pieces_of

    characters = CHARACTERS_A_TOKEN * length * texts
    source = read_texts(told["text"], told["language"], where=told["where"], characters=characters)
    pieces = pieces_of(answering.tokenizer, source, length, texts, join=True)
    settings = {
        "text": told["text"] or f"built in, {told['language']}",
        "where": told["where"],
        "texts": len(pieces),
        "texts_fingerprint": fingerprint(pieces),
        "length_tokens": length,
    }
    of_text = {f"text/{i}": piece for i, piece in enumerate(pieces)}

    def loss(key: str) -> list[Row]:
        return [{"key": key, "loss": float(answering.losses(of_text[key])[1:].mean())}]

    def made(question: str, wanted: str) -> Made:
        head, tail = chat_around(answering.tokenizer, MARK + question)
        return head + tail, lambda reply, _: {
            "question": question,
            "answer": wanted,
            "reply": reply.strip(),
            "right": is_right(wanted, reply),
        }

    asked = {
        f"question/{i}": Question(QUESTION_TOKENS, ANSWER_TOKENS, partial(made, *one))
        for i, one in enumerate(questions())
    }
    todo = answering.open_rows("short", settings, [*of_text, *asked])
    answering.add([key for key in todo if key in of_text], loss)
    answering.add_answers({key: asked[key] for key in todo if key in asked})
    return answering.finish("short", lambda rows: _summary(rows, length))


def _show(result: dict[str, Any], path: Path) -> None:
    table = Table("short", "")
    table.add_row(f"loss of {result['texts']} texts of {result['length_tokens']} tokens", f"{result['loss']:.4f}")
    table.add_row(f"right of {result['questions']} questions", f"{result['right_percent']:.1f} %")
    print_tables(path, table)


def is_right(answer: str, reply: str) -> bool:
    """Whether the reply holds the answer as a word of its own: 9 is not in 19, nor old in cold."""
    return re.search(rf"\b{re.escape(answer)}\b", reply, re.IGNORECASE) is not None


def _summary(rows: list[Row], length: int) -> dict[str, Any]:
    losses = [row["loss"] for row in rows if row["key"].startswith("text/")]
    answers = [row for row in rows if row["key"].startswith("question/")]
    return {
        "loss": round(float(np.mean(losses)), 4),
        "texts": len(losses),
        "length_tokens": length,
        "questions": len(answers),
        "right_percent": round(100 * float(np.mean([row["right"] for row in answers])), 1),
        "samples": [{key: row[key] for key in ("question", "answer", "reply", "right")} for row in answers[::10]],
    }
