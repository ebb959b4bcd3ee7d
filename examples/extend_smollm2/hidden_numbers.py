"""Numbers hidden in running text and asked for afterwards, one at a time or several at once, in several turns.

One long text yields several trained answers that way; where they stand but for the edges, and how they are told, is
drawn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_longft.data.rows import Turn
from ds_longft.errors import DataError
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.row_plan import plan_rows
from ds_longft.tools.make_data.synth.sources import Document
from ds_longft.tools.make_data.synth.stretches import RunningText, fill, running_texts
from examples.extend_smollm2.number_wordings import SPEECH, Speech, facts_about

QUESTIONS = 8
AT_AN_EDGE = 1 / 16  # share of the numbers before the first sentence, and the same behind the last
AT_ONCE = 4
MAX_QUESTIONS = 128  # fewer than there are names of any kind (`Speech.most_names`)
SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？\n]")

Messages = list[dict[str, str]]


def number_rows(
    documents: Sequence[Document],
    *,
    rows: int,
    context_tokens: int,
    seed: int,
    name: str,
    questions: int = QUESTIONS,
    at_once: int = AT_ONCE,
    languages: Mapping[str, float] | None = None,
    sizes: Mapping[str, float] | None = None,
    lengths: Lengths | None = None,
) -> Iterator[dict[str, Any]]:
    """`rows` rows in `messages` form; the same seed gives the same rows.

    Args:
        documents: English and Chinese texts to hide numbers in, cut as in `stretch_rows`; others are left out.
        context_tokens: longest row.
        questions: at most so many numbers are hidden in a row, each asked for once; fewer in rows of which they would
            be more than half.
        at_once: up to so many are asked for in one turn; half of the turns ask for so many. Also the fewest numbers of
            a row.
        languages: shares of the rows, by language code; left out, as there is text.
        sizes: part of the longest row -> share of the rows; left out, `row_plan.SIZES`.
        lengths: how tokens are counted; estimated when left out.

    Raises:
        DataError: no English or Chinese text, or less of it than the longest row has tokens.
    """
    lengths = lengths or Lengths()
    running = running_texts([d for d in documents if d.language in SPEECH], lengths)
    if not running:
        raise DataError("no numbers can be hidden: the documents hold no English or Chinese text")
    rng = random.Random(f"numbers {seed}")
    amounts = {language: text.tokens for language, text in running.items()}
    planned = plan_rows(rows, amounts, context_tokens, rng, languages=languages, sizes=sizes)
    for number, (language, tokens) in enumerate(planned):
        messages = _row(running[language], SPEECH[language], tokens, questions, at_once, lengths, rng)
        yield {"messages": messages, "source": name, "language": language, "id": f"{name}-{seed}-{number}"}


def _row(
    text: RunningText, speech: Speech, tokens: int, most: int, at_once: int, lengths: Lengths, rng: random.Random
) -> Messages:
    """A chat of at most, and nearly, so many tokens: running text for half of them at least.

    As many rows hide 4 to 8 numbers as 32 to 64. A few in a long text are harder to find than many: trained on rows
    that hid as many as fit, a model answered four questions in words it had not met to 87 % with 64 numbers in 8,192
    tokens, to 67 % with 4.
    """
    head = rng.choice(speech.heads)
    fewest = min(at_once, most)
    count = round(fewest * (most / fewest) ** rng.random())
    start = text.place(tokens, rng)

    def make(room: int) -> Messages:
        hidden = hide(text.cut(start, room), [fact[0] for fact in facts], depths, speech.blank)
        first, *others = turns
        return [{"role": "user", "content": f"{head}{hidden}\n\n{first['content']}"}, *others]

    def measure(messages: Messages) -> int:
        return lengths.rows([[Turn("assistant" if i % 2 else "user", m["content"]) for i, m in enumerate(messages)]])[0]

    while True:
        facts = facts_about(speech, count, rng)
        depths = _depths(count, rng)
        turns = _turns(facts, speech, at_once, rng)
        around = measure(make(0))
        if around <= tokens // 2 or count == 1:
            return fill(make, measure, tokens, tokens - around)
        count = max(1, min(count - 1, count * tokens // (2 * around)))


def _depths(count: int, rng: random.Random) -> list[float]:
    """Where the numbers stand, 0 to 1; some before the first sentence and behind the last.

    A few dozen places drawn from 131,072 tokens do not meet the edges: a model trained on such rows found all single
    numbers in that window but those before the first sentence (12 of 16); with one of 64 there, 2 of 4.
    """
    inside = 1 - 2 * AT_AN_EDGE
    return [min(1.0, max(0.0, (rng.random() - AT_AN_EDGE) / inside)) for _ in range(count)]


def _turns(facts: Sequence[tuple[str, str, str]], speech: Speech, at_once: int, rng: random.Random) -> Messages:
    """Questions and answers in another order than in the text: `123`, or `123, 456`.

    Half of the turns ask for as many as may be asked at once, the others evenly for fewer. Finding one number is
    learned long before answering several in order: with one turn in ten a model of 135M weights answered four questions
    with three numbers, with one in three it skipped a name and said the next one's number twice.
    """
    fewer = range(1, at_once)
    counts = [*fewer, *fewer, *[at_once] * max(1, 2 * len(fewer))]
    left = rng.sample(list(facts), len(facts))
    messages: Messages = []
    while left:
        count = rng.choice(counts)
        asked, left = left[:count], left[count:]
        template = rng.choice(speech.one if len(asked) == 1 else speech.several)
        question = template.format(q=speech.blank.join(fact[1] for fact in asked))
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": ", ".join(fact[2] for fact in asked)},
        ]
    return messages


def hide(text: str, sentences: Sequence[str], depths: Sequence[float], blank: str) -> str:
    """The text with each sentence behind the sentence end before its depth (0 to 1), or at its beginning."""
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(text))]
    parts, before = [], 0
    for depth, sentence in sorted(zip(depths, sentences, strict=True)):
        place = max(end for end in ends if end <= depth * len(text))
        parts += [text[before:place], blank, sentence, blank]
        before = place
    return "".join([*parts, text[before:]])
