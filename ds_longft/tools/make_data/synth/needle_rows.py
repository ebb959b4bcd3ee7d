"""Needles in real documents: long contexts of any plain text, with questions whose answers are checked by program."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ds_longft.errors import DataError
from ds_longft.tools.make_data.lengths import CHARS_PER_TOKEN, HAN_PER_TOKEN, Lengths
from ds_longft.tools.make_data.synth.needle_tasks import TASKS, WORDINGS, Task, ask, numbered, solve
from ds_longft.tools.make_data.synth.row_plan import Messages, Wanted, in_turns
from ds_longft.tools.make_data.synth.sources import Document

PARAGRAPH_CHARS = {"en": 400, "zh": 160}  # lines are joined up to about this length
TRIES = 50  # to make a row, before the documents are given up
SHORTEST = 4  # contexts are drawn between the longest and a quarter of it


def needle_rows(
    documents: Sequence[Document], wanted: Wanted, *, questions: int = 3, tasks: Sequence[Task] = TASKS
) -> Iterator[dict[str, Any]]:
    """Rows in `messages` form. The contexts' lengths are drawn evenly on a logarithmic scale down to a quarter.

    Args:
        documents: English and Chinese texts; others are left out.
        wanted: how many rows, and how long.
        questions: asked one after the other about one context.
        tasks: which kinds, in equal parts.

    Raises:
        DataError: no documents in these languages, or none that yield a question.
    """
    texts: dict[str, list[list[str]]] = {}
    for document in documents:
        if document.language in WORDINGS:
            texts.setdefault(document.language, []).append(paragraphs_of(document.text, document.language))
    texts = {language: found for language, found in texts.items() if sum(map(len, found)) >= 2 * SHORTEST}
    if not texts:
        raise DataError("no needles can be hidden: the documents hold no English or Chinese text of a few paragraphs")
    rng = random.Random(f"needle {wanted.seed}")
    languages = sorted(texts)
    per_token = {"zh": HAN_PER_TOKEN, "en": CHARS_PER_TOKEN}
    shares = [sum(len(p) for d in texts[lang] for p in d) / per_token[lang] for lang in languages]
    for number in range(wanted.rows):
        for _ in range(TRIES):
            language = rng.choices(languages, shares)[0]
            made = _row(texts[language], language, wanted, questions, tasks, rng)
            if made is not None:
                break
        else:
            raise DataError(
                f"no needle question of at most {wanted.context_tokens} tokens could be made of these documents: give "
                "longer documents, a larger --context_tokens, or fewer --questions"
            )
        messages, kinds = made
        yield {"messages": messages, **wanted.identity(number, language), "tasks": kinds}


def paragraphs_of(text: str, language: str) -> list[str]:
    """Paragraphs of a few sentences each, on one line each: short and wrapped lines are joined."""
    blank = WORDINGS[language].blank
    paragraphs: list[str] = []
    current = ""
    for wrapped in text.splitlines():
        line = re.sub(r"\s+", " ", wrapped).strip()
        if line:
            current = f"{current}{blank}{line}" if current else line
        if len(current) >= PARAGRAPH_CHARS[language]:
            paragraphs.append(current)
            current = ""
    return [*paragraphs, current] if current else paragraphs


def _row(
    documents: Sequence[list[str]],
    language: str,
    wanted: Wanted,
    questions: int,
    tasks: Sequence[Task],
    rng: random.Random,
) -> tuple[Messages, list[Task]] | None:
    """Messages of a row and what was asked, or None where the documents drawn did not lend themselves to it."""
    own = rng.randrange(len(documents))
    length = int(wanted.context_tokens / SHORTEST ** rng.random())
    room = length - 120 * questions  # tokens of a question and its answer, about
    paragraphs = _gather(documents, own, room, wanted.lengths, rng)
    if len(paragraphs) < SHORTEST:
        return None
    # What is absent should look as if it could be there: the rest of the document, and its neighbour.
    foreign = [p for p in (*documents[own], *documents[own - 1]) if p not in set(paragraphs)]
    asked: list[tuple[Task, str, str]] = []
    # Chains first: they write into the text that the others are about.
    for task in sorted(rng.choices(tasks, k=questions), key=lambda task: task != "chain"):
        if task == "chain" and any(kind == "chain" for kind, *_ in asked):
            continue  # a second chain could cross the first
        made = ask(task, paragraphs, foreign, language, rng)
        if made is not None and all(made[0] != question for _, question, _ in asked):
            asked.append((task, *made))
    context = numbered(paragraphs)
    asked = [(task, q, a) for task, q, a in asked if solve(context, q, language) == a]
    if not asked:
        return None
    rng.shuffle(asked)
    messages = in_turns(f"{context}\n\n", [(question, answer) for _, question, answer in asked])
    fits = wanted.lengths.chat(messages) <= wanted.context_tokens
    return (messages, [task for task, *_ in asked]) if fits else None


def _gather(
    documents: Sequence[list[str]], own: int, room_tokens: int, lengths: Lengths, rng: random.Random
) -> list[str]:
    """Paragraphs in their order from a random place of document `own`, going on in the next ones, up to the room."""
    paragraphs: list[str] = []
    at = rng.randrange(max(1, len(documents[own])))
    if sum(len(p) for p in documents[own][at:]) < sum(len(p) for p in documents[own]) / 2:
        at = 0  # near its end a document would give little
    for step in range(len(documents)):
        for paragraph in documents[(own + step) % len(documents)][at:]:
            room_tokens -= lengths.text(paragraph) + 4  # its number
            if room_tokens < 0:
                return paragraphs
            paragraphs.append(paragraph)
        at = 0
    return paragraphs
