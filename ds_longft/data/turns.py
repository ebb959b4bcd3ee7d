"""Messages as any trainer or chat service writes them -> turns: roles, flags, parts, thinking, calls of tools."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ds_longft.data.columns import is_blank, unused_keys
from ds_longft.data.rows import BadRow, Call, Role, Turn

ROLE_NAMES: dict[str, Role] = {
    **dict.fromkeys(["system", "developer"], "system"),
    **dict.fromkeys(["user", "human"], "user"),
    **dict.fromkeys(["assistant", "gpt", "chatgpt", "model", "bot", "function_call", "tool_call"], "assistant"),
    **dict.fromkeys(["tool", "observation", "tool_response", "function", "ipython"], "tool"),
}
CALLS = ("function_call", "tool_call")  # roles of messages that hold a call and nothing else
REASONING = ("reasoning_content", "reasoning", "thinking")  # where chat services put what was thought
WEIGHTS = (1e-6, 1e6)  # products of a row's and a message's, summed over a row, stay exact enough in float32
# What other trainers call "is this turn trained?", and what means yes.
FLAGS = {"train": True, "training": True, "trainable": True, "loss": True, "loss_mask": True, "masked": False}
FACTORS = ("weight", "loss_scale")


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


def _named(value: Any, what: str) -> str:
    """A name that may be left out."""
    return text_of(value, what) if value else ""


def list_of(value: Any, what: str) -> list[Any]:
    """A list with something in it. Raises `BadRow`."""
    if not isinstance(value, list):
        raise BadRow(f"{what} is not a list", f"seen {type(value).__name__}")
    if not value:
        raise BadRow(f"{what} is empty")
    return value


def weight_of(value: Any, what: str) -> float:
    """A weight of 0, or one that float32 holds; 1 where none is given. Raises `BadRow`."""
    if value is None:
        return 1.0
    if not isinstance(value, (int, float)) or not (value == 0 or WEIGHTS[0] <= value <= WEIGHTS[1]):
        raise BadRow(f"{what} is not 0 or a number from {WEIGHTS[0]:g} to {WEIGHTS[1]:g}", f"seen {str(value)[:40]}")
    return float(value)


def gains_of(value: Any) -> tuple[float, ...] | None:
    """A list of numbers; None where none is given. Raises `BadRow`."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(gain, int | float) and math.isfinite(gain) for gain in value):
        raise BadRow("token_gains is no list of numbers", f"seen {str(value)[:40]}")
    return tuple(value)


def turns_of(messages: list[Any], unused: set[str] | None = None) -> list[Turn]:
    """Messages as turns; the order of the roles is not judged here. Raises `BadRow`.

    `unused` gets the keys of messages that hold something which is in no turn.
    """
    turns: list[Turn] = []
    for message in messages:
        if not isinstance(message, dict):
            raise BadRow("a message is not an object", f"seen {type(message).__name__}")
        reader = _Message(message)
        for turn in reader.turns():
            if not (reader.is_call and turns and turns[-1].role == "assistant"):
                turns.append(turn)
                continue
            said = turns[-1]  # a call in a message of its own belongs to the answer before it
            if said.weight != turn.weight:
                seen = f"seen {said.weight:g} and {turn.weight:g}"
                raise BadRow("an answer and its call have different weights", seen)
            turns[-1] = replace(said, calls=said.calls + turn.calls)
        if unused is not None:
            unused |= {f"{key} of a message" for key in unused_keys(message, reader.read)}
    return turns


class _Message:
    """Reads one message, and remembers which keys it has read."""

    def __init__(self, message: dict[str, Any]) -> None:
        self._message = message
        self.read: set[str] = set()
        key = "from" if message.get("role") is None and "from" in message else "role"
        name = text_of(self._get(key), key)
        if name not in ROLE_NAMES:
            raise BadRow("unknown role", f"seen {name!r}, known are {', '.join(ROLE_NAMES)}")
        self._role, self.is_call = ROLE_NAMES[name], name in CALLS

    def turns(self) -> list[Turn]:
        """The turns of the message: one, or several where results of tools stand among a user's words."""
        content = self._get(
            "value" if is_blank(self._message.get("content")) and "value" in self._message else "content"
        )
        weight = self._weight()
        if self.is_call:
            return [Turn("assistant", "", weight, calls=calls_of(text_of(content, "content")))]
        if self._role == "tool" and not _is_parts(content):
            return [replace(self._result(content), weight=weight)]
        parts = _Parts(content) if isinstance(content, list) else None
        if self._role == "assistant":
            thinking = self._thinking() or (parts.thinking if parts else "")
            calls = self._calls() + (parts.calls if parts else ())
            says_more = bool(calls or thinking.strip())
            words = parts.text if parts else "" if content is None and says_more else text_of(content, "content")
            return [Turn("assistant", words, weight, thinking, calls)]
        words = parts.text if parts else text_of(content, "content")
        if self._role == "tool":
            return [replace(self._result(words), weight=weight)]
        results = parts.results if parts else []
        asks = [] if results and not words else [Turn(self._role, words, weight)]
        return [*results, *asks]

    def _get(self, key: str) -> Any:
        self.read.add(key)
        return self._message.get(key)

    def _weight(self) -> float:
        """The product of everything that says how much this turn counts."""
        weight = 1.0
        for key in FACTORS:
            weight *= weight_of(self._get(key), f"{key} of a message")
        for key, yes in FLAGS.items():
            value = self._get(key)
            if value is None:
                continue
            if value not in (0, 1):
                raise BadRow(f"{key} of a message is neither true nor false", f"seen {str(value)[:40]}")
            weight *= bool(value) == yes
        return weight

    def _thinking(self) -> str:
        thoughts = {key: text_of(self._message[key], key) for key in REASONING if not is_blank(self._message.get(key))}
        first = next(iter(thoughts.values()), "")
        self.read |= {key for key, thought in thoughts.items() if thought == first}
        return first

    def _calls(self) -> tuple[Call, ...]:
        calls: tuple[Call, ...] = ()
        for key in ("tool_calls", "function_call"):
            value = self._get(key)
            if not is_blank(value):
                calls += calls_of(value)
        return calls

    def _result(self, content: Any) -> Turn:
        words = text_of(content, "content") if isinstance(content, str) or content is None else _json(content)
        name, call = _named(self._get("name"), "name"), _named(self._get("tool_call_id"), "tool_call_id")
        return Turn("tool", words, name=name, call_id=call)


def _is_parts(content: Any) -> bool:
    """Whether a list is made of parts of a message, not of data that a tool gave back."""
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


class _Parts:
    """Content as a list of parts: text, what was thought, calls of tools, their results."""

    def __init__(self, parts: Iterable[Any]) -> None:
        self.text, self.thinking = "", ""
        self.calls: tuple[Call, ...] = ()
        self.results: list[Turn] = []
        others = set()
        for part in parts:
            if isinstance(part, str):
                self.text += text_of(part, "content")
                continue
            kind: Any = type(part).__name__
            if isinstance(part, dict):
                kind = part.get("type", "text" if "text" in part else None)
            if kind in ("text", "input_text", "output_text"):
                self.text += text_of(part.get("text"), "content")
            elif kind in ("thinking", "reasoning"):
                self.thinking += text_of(part.get("thinking") or part.get("text"), "thinking")
            elif kind == "tool_use":
                self.calls += calls_of([part])
            elif kind == "tool_result":
                words = part.get("content")
                if not isinstance(words, str):
                    words = _Parts(words).text if _is_parts(words) else _json(words)
                call = _named(part.get("tool_use_id"), "id")
                self.results.append(Turn("tool", text_of(words, "content"), call_id=call))
            else:
                others.add(str(kind))
        if others:
            raise BadRow("content holds other parts than text", f"seen {', '.join(sorted(others))}")


def calls_of(value: Any) -> tuple[Call, ...]:
    """Calls of tools: a list, one object, or JSON of either. Raises `BadRow`."""
    value = _parsed(value, "a tool call")
    calls = []
    given: Any
    for each in value if isinstance(value, list) else [value]:
        call = _parsed(each, "a tool call")
        if not isinstance(call, dict):
            raise BadRow("a tool call is not an object", f"seen {type(call).__name__}")
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        given = next((inner[k] for k in ("arguments", "input", "parameters") if not is_blank(inner.get(k))), {})
        arguments = _parsed(given, "arguments of a tool call")
        if not isinstance(arguments, dict):
            raise BadRow("arguments of a tool call are not an object", f"seen {type(arguments).__name__}")
        name = text_of(inner.get("name"), "name of a tool call")
        calls.append(Call(name, _json(arguments), _named(call.get("id"), "id")))
    return tuple(calls)


def tools_of(value: Any) -> str:
    """Tool schemas as JSON of one list, each as {"type": "function", "function": ...}; "" where there are none.

    They may be a list, or JSON of one; each an object, or JSON of one. Raises `BadRow`.
    """
    value = _parsed(value, "tools") if not is_blank(value) else None
    if is_blank(value):
        return ""
    schemas = [_parsed(tool, "a tool") for tool in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, dict) for tool in schemas):
        raise BadRow("a tool is not an object", f"seen {', '.join(sorted({type(t).__name__ for t in schemas}))}")
    return _json([t if "function" in t or "name" not in t else {"type": "function", "function": t} for t in schemas])


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(text_of(value, what))
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what} is no JSON" if what.startswith("a ") else f"{what} are no JSON", value[:60]) from error


def _json(value: Any) -> str:
    try:
        return text_of(json.dumps(value, ensure_ascii=False), "JSON of a message")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("a message holds what JSON cannot", str(error)) from error
