"""Row layouts: a dict as it lies in the file -> `Row`.

`FORMATS` names a function for each layout. A function takes the dict and returns the turns; what is wrong with a row
is raised as `BadRow`. Everything that holds for all layouts (order of roles, empty answers, weights) is checked once,
in `to_row`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ds_longft.data.rows import BadRow, Role, Row, Turn
from ds_longft.errors import DataError

__all__ = ["FORMATS", "detect_format", "grounded", "language_of", "text_of", "to_row", "turns_of", "weight_of"]

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # where chat services put what was thought
WEIGHTS = (1e-6, 1e6)  # products of a row's and a message's, summed over a row, stay exact enough in float32
LANGUAGES = {"chinese": "zh", "english": "en", "cn": "zh", "中文": "zh", "英文": "en"}  # as published sets write them
ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\ufeff"))  # the two joiners (200c, 200d) are part of Persian words and emoji


def text_of(value: Any, what: str) -> str:
    """A string of valid Unicode. Raises `BadRow` that says `what` it is not."""
    if value is None:
        raise BadRow(f"{what} is null or missing")
    if not isinstance(value, str):
        raise BadRow(f"{what} is not a string", f"seen {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"{what} is not valid Unicode", str(error)) from error
    return value


def _content(value: Any) -> str:
    """A string, or a list of text parts as chat services write it."""
    if isinstance(value, list):
        kinds = {part.get("type") if isinstance(part, dict) else type(part).__name__ for part in value}
        if kinds != {"text"}:
            raise BadRow("content holds other parts than text", f"seen {', '.join(sorted(map(str, kinds)))}")
        return "".join(text_of(part.get("text"), "content") for part in value)
    return text_of(value, "content")


def weight_of(value: Any, what: str) -> float:
    """A weight of 0, or one that float32 holds; 1 where none is given. Raises `BadRow`."""
    if value is None:
        return 1.0
    if not isinstance(value, (int, float)) or not (value == 0 or WEIGHTS[0] <= value <= WEIGHTS[1]):
        raise BadRow(f"{what} is not 0 or a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}", f"seen {str(value)[:40]}")
    return float(value)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{what} is not a list", f"seen {type(value).__name__}")
    if not value:
        raise BadRow(f"{what} is empty")
    return value


def turns_of(messages: list[Any], role_key: str, content_key: str) -> list[Turn]:
    """Messages as turns; the order of the roles is not judged here. Raises `BadRow`."""
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("a message is not an object", f"seen {type(message).__name__}")
        name = text_of(message.get(role_key), role_key)
        if name not in ROLE_NAMES:
            raise BadRow("unknown role", f"seen {name!r}, known are {', '.join(ROLE_NAMES)}")
        if message.get("tool_calls"):
            raise BadRow("tool calls cannot be trained")
        for key in REASONING:
            if message.get(key):
                raise BadRow(
                    "reasoning beside the answer cannot be trained", f"seen {key!r}: write it into the content"
                )
        weight = weight_of(message.get("weight"), "weight of a message")
        turns.append(Turn(ROLE_NAMES[name], _content(message.get(content_key)), weight))
    return turns


def _system(row: dict[str, Any]) -> list[Turn]:
    """The turn of a column beside the messages."""
    key = "system" if row.get("system") else "system_prompt"
    return [Turn("system", text_of(row[key], key))] if row.get(key) else []


def _messages(row: dict[str, Any]) -> list[Turn]:
    """A chat; plain text where the row has `text` instead, so that one file may hold both kinds."""
    if "messages" not in row and "text" in row:
        return _plain_text(row)
    turns = turns_of(_list(row.get("messages"), "messages"), "role", "content")
    if row.get("tools"):
        raise BadRow("tools cannot be trained")
    return turns if turns[0].role == "system" else _system(row) + turns


def _longalign(row: dict[str, Any]) -> list[Turn]:
    """LongAlign-10k strips zero-width characters, left over from web pages, from its answers."""
    turns = _messages(row)
    return [replace(t, content=t.content.translate(ZERO_WIDTH)) if t.role == "assistant" else t for t in turns]


def _sharegpt(row: dict[str, Any]) -> list[Turn]:
    turns = turns_of(_list(row.get("conversations"), "conversations"), "from", "value")
    return turns if turns[0].role == "system" else _system(row) + turns


def _alpaca(row: dict[str, Any]) -> list[Turn]:
    turns = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise BadRow("history is not a list of [question, answer]")
    for pair in history:
        turns += [Turn("user", text_of(pair[0], "history")), Turn("assistant", text_of(pair[1], "history"))]
    question = text_of(row.get("instruction"), "instruction")
    if row.get("input"):
        question = f"{question}\n\n{text_of(row['input'], 'input')}"
    return [*turns, Turn("user", question), Turn("assistant", text_of(row.get("output"), "output"))]


def _prompt_completion(row: dict[str, Any]) -> list[Turn]:
    """A prompt is never trained, also where it holds earlier answers."""
    ask, answer = ("prompt", "completion") if "prompt" in row else ("input", "output")
    prompt, completion = row.get(ask), row.get(answer)
    if isinstance(prompt, list):
        turns = [Turn(t.role, t.content, 0.0) for t in turns_of(_list(prompt, ask), "role", "content")]
    else:
        turns = [Turn("user", text_of(prompt, ask))]
    if isinstance(completion, list):
        turns += turns_of(_list(completion, answer), "role", "content")
    else:
        turns.append(Turn("assistant", text_of(completion, answer)))
    return turns if turns[0].role == "system" else _system(row) + turns


def grounded(row: dict[str, Any]) -> tuple[str, list[Turn]]:
    """(reference text, dialogue about it) of a row that carries both; the reference is not yet in the dialogue.

    Layouts: RefGPT-Fact (`reference`, `dialogue` in one string), anti-haystack (`document`, `question`, `answer`),
    reading comprehension (`context`, `qas`: each pair becomes two turns), `reference` beside `messages`. Raises
    `BadRow`.
    """
    if "dialogue" in row:
        return text_of(row.get("reference"), "reference"), _refgpt_turns(text_of(row["dialogue"], "dialogue"))
    if "qas" in row:
        turns = []
        for pair in _list(row["qas"], "qas"):
            if not isinstance(pair, dict):
                raise BadRow("qas holds something that is no object", f"seen {type(pair).__name__}")
            answers = pair.get("answers")
            answer = answers[0] if isinstance(answers, list) and answers else pair.get("answer")
            turns += [Turn("user", text_of(pair.get("question"), "question"))]
            turns += [Turn("assistant", text_of(answer, "answer"))]
        return text_of(row.get("context"), "context"), turns
    if "document" in row:
        turns = [Turn("user", text_of(row.get("question"), "question"))]
        return text_of(row["document"], "document"), [*turns, Turn("assistant", text_of(row.get("answer"), "answer"))]
    reference = row.get("reference")
    if isinstance(reference, list):
        reference = "\n".join(text_of(part, "reference") for part in reference)
    return text_of(reference, "reference"), _messages(row)


def _grounded(row: dict[str, Any]) -> list[Turn]:
    """The reference stands in front of the first question."""
    reference, turns = grounded(row)
    if not reference.strip():
        raise BadRow("empty reference")
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
    asked = replace(turns[first], content=f"{reference.rstrip()}\n\n{turns[first].content}")
    return [*turns[:first], asked, *turns[first + 1 :]]


_REFGPT_TURN = re.compile(r"<(Human|Assistant)\s*(\d+)>\s*[:：]?\s*")
# The generator's plan asks for lengths in brackets, and its answers at times repeat them.
_WORD_COUNT = re.compile(r"\s*[(（][^()（）]{0,24}(?:字数|word count)[^()（）]{0,24}[)）]\s*", re.IGNORECASE)


def _refgpt_turns(dialogue: str) -> list[Turn]:
    """`<start_chat><Human 1>:(word count: 20 words)... <Assistant 1>:... <end_chat>` -> turns."""
    text = dialogue.strip()
    if not (text.startswith("<start_chat>") and text.endswith("<end_chat>")):
        raise BadRow("dialogue without <start_chat> and <end_chat>", f"seen {text[:30]!r} ... {text[-30:]!r}")
    before, *parts = _REFGPT_TURN.split(text.removeprefix("<start_chat>").removesuffix("<end_chat>"))
    if before.strip() or not parts:
        raise BadRow("dialogue does not begin with <Human 1>", f"seen {text[12:60]!r}")
    turns = []
    for i, (speaker, number, content) in enumerate(zip(parts[::3], parts[1::3], parts[2::3], strict=True)):
        if int(number[:9]) != i // 2 + 1:
            raise BadRow("turns of the dialogue are not numbered one by one", f"seen <{speaker} {number[:9]}>")
        said = _WORD_COUNT.sub("", content, count=1) if _WORD_COUNT.match(content) else content
        turns.append(Turn("user" if speaker == "Human" else "assistant", said.strip()))
    return turns


def _plain_text(row: dict[str, Any]) -> list[Turn]:
    return [Turn("text", text_of(row.get("text"), "text"))]


FORMATS: dict[str, Callable[[dict[str, Any]], list[Turn]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
    "longalign": _longalign,
    "grounded": _grounded,
}

# The columns that give a layout away, in the order they are tried.
_TELLTALES: list[tuple[str, set[str]]] = [
    ("grounded", {"reference", "dialogue"}),
    ("grounded", {"reference", "messages"}),
    ("grounded", {"document", "question", "answer"}),
    ("grounded", {"context", "qas"}),
    ("longalign", {"messages", "length"}),
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("alpaca", {"instruction", "output"}),
    ("prompt_completion", {"prompt", "completion"}),
    ("prompt_completion", {"input", "output"}),
    ("text", {"text"}),
]


def detect_format(columns: Iterable[str], path: str) -> str:
    """Name of the layout that has these columns; `DataError` naming the columns when none has."""
    seen = set(columns)
    if {"chosen", "rejected"} <= seen:
        raise DataError(
            f"{path} holds preference pairs (columns chosen, rejected), but objective is sft: set objective to dpo"
        )
    for name, needed in _TELLTALES:
        if needed <= seen:
            return name
    known = "; ".join(f"{name}: {', '.join(sorted(needed))}" for name, needed in _TELLTALES)
    raise DataError(
        f"{path}: no known row layout has the columns {', '.join(sorted(seen)) or '(none)'}. Expected one of: {known}. "
        "Rename the columns, or set data.train[].format of this source if the first row is an exception"
    )


def to_row(record: dict[str, Any], format: str, *, source: str, origin: str) -> Row:
    """`Row` of one record laid out as `format` (a key of `FORMATS`). Raises `BadRow`.

    A last turn that is not an answer is dropped, an empty answer is kept untrained, as LongAlign does. The record's own
    `source` wins over the one given.
    """
    turns = FORMATS[format](record)
    if turns[-1].role == "user":
        turns = turns[:-1]
    _check_order(turns)
    turns = [replace(t, weight=0.0) if t.role == "assistant" and not t.content.strip() else t for t in turns]
    own = record.get("source")
    return Row(
        turns=tuple(turns),
        source=text_of(own, "source") if isinstance(own, str) and own else source,
        origin=origin,
        language=language_of(record),
        weight=weight_of(record.get("weight"), "weight of the row"),
    )


def language_of(record: dict[str, Any]) -> str | None:
    """The language a record names, as a two-letter code where it is one; None where it names none."""
    named = record.get("language") or record.get("lang")
    if not isinstance(named, str):
        return None
    text = text_of(named, "language").strip().lower()
    return LANGUAGES.get(text, re.split(r"[-_]", text)[0][:16]) or None


def _check_order(turns: list[Turn]) -> None:
    """System first if at all, then user and assistant in turns, with words in every question and in some answer."""
    if len(turns) == 1 and turns[0].role == "text":
        if not turns[0].content.strip():
            raise BadRow("empty text")
        return
    chat = turns[1:] if turns and turns[0].role == "system" else turns
    if len(chat) < 2:
        raise BadRow("no answer")
    for turn, expected in zip(chat, ("user", "assistant") * (len(chat) // 2 + 1), strict=False):
        if turn.role != expected:
            seen = " ".join(t.role for t in turns[:8])
            raise BadRow("wrong role order", f"seen {seen}, expected user and assistant in turns")
        if expected == "user" and not turn.content.strip():
            raise BadRow("empty question")
    if chat[-1].role != "assistant":
        raise BadRow("wrong role order", "the last turn is no answer")
    if not any(turn.content.strip() for turn in chat[1::2]):
        raise BadRow("empty answer")
