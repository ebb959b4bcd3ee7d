"""Row layouts: a dict as it lies in the file -> `Row`.

`FORMATS` names a function for each layout. A function takes the dict and returns the turns; what is wrong with a row
is raised as `BadRow`. Everything that holds for all layouts (order of roles, empty answers, weights) is checked once,
in `to_row`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from ds_longft.data.rows import BadRow, Role, Row, Turn
from ds_longft.errors import DataError

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def _text(value: Any, what: str) -> str:
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
        return "".join(_text(part.get("text"), "content") for part in value)
    return _text(value, "content")


def _weight(value: Any, what: str) -> float:
    if value is None:
        return 1.0
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise BadRow(f"{what} is not a number of 0 or more", f"seen {value!r}")
    return float(value)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{what} is not a list", f"seen {type(value).__name__}")
    if not value:
        raise BadRow(f"{what} is empty")
    return value


def _turns(messages: list[Any], role_key: str, content_key: str) -> list[Turn]:
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("a message is not an object", f"seen {type(message).__name__}")
        name = _text(message.get(role_key), role_key)
        if name not in ROLE_NAMES:
            raise BadRow("unknown role", f"seen {name!r}, known are {', '.join(ROLE_NAMES)}")
        if message.get("tool_calls"):
            raise BadRow("tool calls cannot be trained")
        weight = _weight(message.get("weight"), "weight of a message")
        turns.append(Turn(ROLE_NAMES[name], _content(message.get(content_key)), weight))
    return turns


def _system(row: dict[str, Any]) -> list[Turn]:
    return [Turn("system", _text(row["system"], "system"))] if row.get("system") else []


def _messages(row: dict[str, Any]) -> list[Turn]:
    return _turns(_list(row.get("messages"), "messages"), "role", "content")


def _sharegpt(row: dict[str, Any]) -> list[Turn]:
    turns = _turns(_list(row.get("conversations"), "conversations"), "from", "value")
    return turns if turns[0].role == "system" else _system(row) + turns


def _alpaca(row: dict[str, Any]) -> list[Turn]:
    turns = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise BadRow("history is not a list of [question, answer]")
    for pair in history:
        turns += [Turn("user", _text(pair[0], "history")), Turn("assistant", _text(pair[1], "history"))]
    question = _text(row.get("instruction"), "instruction")
    if row.get("input"):
        question = f"{question}\n\n{_text(row['input'], 'input')}"
    return [*turns, Turn("user", question), Turn("assistant", _text(row.get("output"), "output"))]


def _prompt_completion(row: dict[str, Any]) -> list[Turn]:
    """A prompt is never trained, also where it holds earlier answers."""
    ask, answer = ("prompt", "completion") if "prompt" in row else ("input", "output")
    prompt, completion = row.get(ask), row.get(answer)
    if isinstance(prompt, list):
        turns = [Turn(t.role, t.content, 0.0) for t in _turns(_list(prompt, ask), "role", "content")]
    else:
        turns = [Turn("user", _text(prompt, ask))]
    if isinstance(completion, list):
        turns += _turns(_list(completion, answer), "role", "content")
    else:
        turns.append(Turn("assistant", _text(completion, answer)))
    return turns if turns[0].role == "system" else _system(row) + turns


def _plain_text(row: dict[str, Any]) -> list[Turn]:
    return [Turn("text", _text(row.get("text"), "text"))]


FORMATS: dict[str, Callable[[dict[str, Any]], list[Turn]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _plain_text,
}

# The columns that give a layout away, in the order they are tried.
_TELLTALES: list[tuple[str, set[str]]] = [
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

    A last turn that is not an answer is dropped, as LongAlign does.
    """
    turns = FORMATS[format](record)
    if turns[-1].role == "user":
        turns = turns[:-1]
    _check_order(turns)
    language = record.get("language") or record.get("lang")
    return Row(
        turns=tuple(turns),
        source=source,
        origin=origin,
        language=language if isinstance(language, str) else None,
        weight=_weight(record.get("weight"), "weight of the row"),
    )


def _check_order(turns: list[Turn]) -> None:
    """System first if at all, then user and assistant in turns, every message with words in it."""
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
        if not turn.content.strip():
            raise BadRow("empty answer" if expected == "assistant" else "empty question")
    if chat[-1].role != "assistant":
        raise BadRow("wrong role order", "the last turn is no answer")
