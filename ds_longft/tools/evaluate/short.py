"""`ds-longft eval short`: what long training must not harm. Short questions by generation, and the loss on short texts.

A model that was stretched and trained on long samples alone may forget how to be short. Compare a run with what it
started from (--before): the loss should rise by 0.05 at most, and the same questions should be answered.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.needle import CHARACTERS_A_TOKEN
from ds_longft.tools.evaluate.texts import Language, read_texts

ANSWER_TOKENS = 32
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
    before: bool = False,
    base: str | None = None,
    out: str | None = None,
    name: str | None = None,
    json: bool = False,
) -> None:
    """Ask 60 short questions and measure the loss on short texts.

    The result goes to RUN/eval/short.json (short-before.json with --before). One GPU, or the CPU.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        text: text file, JSONL or folder for the loss. Left out: the Python documentation of this machine.
        where: column=value, rows to take.
        texts: how many short texts.
        length: tokens of each.
        language: of the built-in text.
        before: evaluate the model that the run MODEL started from.
        base: the base model of an adapter, where it has moved.
        out: folder of the results. Left out: RUN/eval, or eval/<model>.
        name: of the result. Left out: short.
        json: print one JSON object instead of a table.
    """
    if texts < 1 or length < 2:
        raise ConfigError(f"--texts is {texts}, --length is {length}: expected 1 or more, and 2 or more")
    from ds_longft.tools.evaluate import results
    from ds_longft.tools.evaluate.answering import Answering, Target
    from ds_longft.tools.evaluate.haystack import MARK, chat_around
    from ds_longft.tools.evaluate.perplexity import pieces_of
    from ds_longft.tools.evaluate.processes import Processes

    with Processes.of_launch() as processes:
        answering = Answering(processes, Target(model, before, base, out, name))
        source = read_texts(text, language, where=where, characters=CHARACTERS_A_TOKEN * length * texts)
        pieces = pieces_of(answering.tokenizer, source, length, texts, join=True)
        settings = {
            "text": text or f"built in, {language}",
            "where": where,
            "texts": len(pieces),
            "texts_fingerprint": results.fingerprint(pieces),
            "length_tokens": length,
        }
        asked = {f"question/{i}": one for i, one in enumerate(questions())}
        of_text = {f"text/{i}": piece for i, piece in enumerate(pieces)}

        def answer(key: str) -> list[dict[str, Any]]:
            if key in of_text:
                return [{"key": key, "loss": _text_loss(answering.loaded, of_text[key])}]
            question, wanted = asked[key]
            head, tail = chat_around(answering.tokenizer, MARK + question)
            reply = answering.replies([head + tail], ANSWER_TOKENS)[0].strip()
            right = is_right(wanted, reply)
            return [{"key": key, "question": question, "answer": wanted, "reply": reply, "right": right}]

        keys = [*of_text, *asked]
        done = answering.open_rows("short", settings, len(keys))
        todo = [key for key in keys if key not in done]
        made = answering.fill("short", todo, answer, lambda rows: _summary(rows, length))
    results.show(made, json, _show)


def _show(result: dict[str, Any], path: Path) -> None:
    table = Table("short", "")
    table.add_row(f"loss of {result['texts']} texts of {result['length_tokens']} tokens", f"{result['loss']:.4f}")
    table.add_row(f"right of {result['questions']} questions", f"{result['right_percent']:.1f} %")
    Console().print(table)


def _text_loss(loaded: Any, ids: list[int]) -> float:
    """Mean loss (nats) of the tokens after the first."""
    import torch

    from ds_longft.model.rope_lengths import set_rope_lengths

    set_rope_lengths(loaded.plain.get_decoder(), [len(ids)])
    with torch.no_grad():
        row = torch.tensor([ids], device=loaded.device)
        logits = loaded.plain(input_ids=row, use_cache=False).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, row[0, 1:]))


def is_right(answer: str, reply: str) -> bool:
    """Whether the reply holds the answer as a word of its own: 9 is not in 19, nor old in cold."""
    return re.search(rf"\b{re.escape(answer)}\b", reply, re.IGNORECASE) is not None


def _summary(rows: list[dict[str, Any]], length: int) -> dict[str, Any]:
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
