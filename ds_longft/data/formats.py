"""Row layouts: a dict as it lies in the file -> `Row`.

`FORMATS` names a function for each layout of `columns.LAYOUTS`. A function reads the columns and returns the turns;
what is wrong with a row is raised as `BadRow`. Everything that holds for all layouts (the system prompt beside the
turns, tools, order of roles, empty answers, weights, what was not used) is done once, in `to_row`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ds_longft.data.columns import ASKED_MORE, Columns, Layout, detect_format, layout_of
from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.data.turns import gains_of, list_of, text_of, tools_of, turns_of, weight_of

__all__ = ["FORMATS", "asked", "detect_format", "grounded", "language_of", "system_of", "to_row", "tools_in"]

LANGUAGES = {"chinese": "zh", "english": "en", "cn": "zh", "中文": "zh", "英文": "en"}  # as published sets write them
ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\ufeff"))  # the two joiners (200c, 200d) are part of Persian words and emoji
TOKEN_GAINS = "token_gains"
AFTER_ALL = "messages behind the last answer"


def to_row(record: Mapping[str, Any], format: str, *, source: str, origin: str) -> Row:
    """`Row` of one record of a source laid out as `format` (a key of `FORMATS`). Raises `BadRow`.

    What stands behind the last answer is dropped and named in `Row.unused`; an empty answer is kept untrained, as
    LongAlign does. The record's own `source` wins over the one given.
    """
    layout, columns, unused = layout_of(record, format), Columns(record), set[str]()
    turns = FORMATS[layout.format](columns, layout, unused)
    tools = ""
    if layout.format != "text":
        turns = system_of(columns, turns)
        tools = tools_in(columns)
        kept = max((i + 1 for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
        if turns[kept:] and kept:
            unused.add(AFTER_ALL)
            turns = turns[:kept]
        check_order(turns)
    elif not turns[0].content.strip():
        raise BadRow("empty text")
    turns = [replace(t, weight=0.0) if t.role == "assistant" and t.says_nothing else t for t in turns]
    own, language, weight = columns.get("source"), language_of(columns), columns.get("weight")
    return Row(
        turns=tuple(turns), source=text_of(own, "source") if isinstance(own, str) and own else source, origin=origin,
        language=language, weight=weight_of(weight, "weight of the row"), tools=tools,
        gains=gains_of(columns.get(TOKEN_GAINS)), unused=tuple(sorted(unused | set(columns.unused))),
    )  # fmt: skip


def system_of(columns: Columns, turns: list[Turn]) -> list[Turn]:
    """The turns, with the system prompt of a column of its own in front; a turn that says it already comes first."""
    key = columns.first("system", "system_prompt")
    if key is None or (turns and turns[0].role == "system"):
        return turns  # where both differ, the column stays unread, and is named
    return [Turn("system", text_of(columns.get(key), key)), *turns]


def tools_in(columns: Columns) -> str:
    """The tool schemas of a record, as JSON."""
    key = columns.first("tools", "functions")
    return tools_of(columns.get(key)) if key else ""


def _messages(columns: Columns, layout: Layout, unused: set[str]) -> list[Turn]:
    key = "conversations" if layout.format == "sharegpt" else "messages"
    return turns_of(list_of(columns.get(key), key), unused)


def _longalign(columns: Columns, layout: Layout, unused: set[str]) -> list[Turn]:
    """LongAlign-10k strips zero-width characters, left over from web pages, from its answers."""
    turns = _messages(columns, layout, unused)
    return [replace(t, content=t.content.translate(ZERO_WIDTH)) if t.role == "assistant" else t for t in turns]


def asked(columns: Columns, key: str, unused: set[str]) -> list[Turn]:
    """What is asked in column `key` (text or messages), behind `history`, with `input` or `context` below it."""
    history = columns.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise BadRow("history is not a list of [question, answer]")
    turns = []
    for pair in history:
        turns += [Turn("user", text_of(pair[0], "history")), Turn("assistant", text_of(pair[1], "history"))]
    value = columns.get(key)
    turns += turns_of(list_of(value, key), unused) if isinstance(value, list) else [Turn("user", text_of(value, key))]
    for more in ASKED_MORE[:2]:
        if more != key and columns.has(more):
            turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n\n{text_of(columns.get(more), more)}")
    return turns


def _asked_and_answered(columns: Columns, layout: Layout, unused: set[str]) -> list[Turn]:
    """A prompt of messages is never trained, also where it holds earlier answers; answers of `history` are."""
    ask, answer = layout.needs
    prompt, completion = asked(columns, ask, unused), columns.get(answer)
    if not isinstance(columns.get(ask), str):
        prompt = [replace(turn, weight=0.0) for turn in prompt]
    if isinstance(completion, list):
        return prompt + turns_of(list_of(completion, answer), unused)
    return [*prompt, Turn("assistant", text_of(completion, answer))]


def grounded(record: Mapping[str, Any]) -> tuple[str, list[Turn]]:
    """(reference text, dialogue about it) of a row that carries both; the reference is not yet in the dialogue.

    Layouts: RefGPT-Fact (`reference`, `dialogue` in one string, or a list of turns), anti-haystack (`document`,
    `question`, `answer`), reading comprehension (`context`, `qas`: each pair becomes two turns), `reference` beside
    `messages`. Raises `BadRow`.
    """
    columns = Columns(record)
    reference, turns = _reference_and_turns(columns, layout_of(record, "grounded"), set())
    return reference, system_of(columns, turns)


def _reference_and_turns(columns: Columns, layout: Layout, unused: set[str]) -> tuple[str, list[Turn]]:
    about, *talk = layout.needs
    reference = columns.get(about)
    if isinstance(reference, list):
        reference = "\n".join(text_of(part, about) for part in reference)
    reference = text_of(reference, about)
    if talk == ["dialogue"]:
        said = columns.get("dialogue")
        turns = turns_of(said, unused) if isinstance(said, list) else _refgpt_turns(text_of(said, "dialogue"))
        return reference, turns
    if talk == ["messages"]:
        return reference, _messages(columns, layout, unused)
    if talk == ["question", "answer"]:
        pairs = [{key: columns.get(key) for key in talk}]
    else:
        pairs = list_of(columns.get("qas"), "qas")
    turns = []
    for pair in pairs:
        if not isinstance(pair, dict):
            raise BadRow("qas holds something that is no object", f"seen {type(pair).__name__}")
        answers = pair.get("answers")
        answer = answers[0] if isinstance(answers, list) and answers else pair.get("answer")
        turns += [Turn("user", text_of(pair.get("question"), "question"))]
        turns += [Turn("assistant", text_of(answer, "answer"))]
    return reference, turns


def _grounded(columns: Columns, layout: Layout, unused: set[str]) -> list[Turn]:
    """The reference stands in front of the first question."""
    reference, turns = _reference_and_turns(columns, layout, unused)
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


def _plain_text(columns: Columns, layout: Layout, unused: set[str]) -> list[Turn]:
    return [Turn("text", text_of(columns.get("text"), "text"))]


FORMATS: dict[str, Callable[[Columns, Layout, set[str]], list[Turn]]] = {
    "messages": _messages,
    "sharegpt": _messages,
    "alpaca": _asked_and_answered,
    "prompt_completion": _asked_and_answered,
    "text": _plain_text,
    "longalign": _longalign,
    "grounded": _grounded,
}


def language_of(record: Columns | Mapping[str, Any]) -> str | None:
    """The language a record names, as a two-letter code where it is one; None where it names none."""
    named = record.get("language") or record.get("lang")
    if not isinstance(named, str):
        return None
    text = text_of(named, "language").strip().lower()
    return LANGUAGES.get(text, re.split(r"[-_]", text)[0][:16]) or None


# What may stand behind what.
FOLLOWS = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}


def check_order(turns: list[Turn]) -> None:
    """System first if at all, then questions and answers in turns, with words in every question and in some answer.

    Results of tools stand behind an answer, any number of them, and an answer or a question behind them.
    """
    chat = turns[1:] if turns and turns[0].role == "system" else turns
    if not any(turn.role == "assistant" for turn in chat) or len(chat) < 2:
        raise BadRow("no answer")
    before = "start"
    for turn in chat:
        if turn.role not in FOLLOWS[before]:
            seen = " ".join(t.role for t in turns[:8])
            raise BadRow("wrong role order", f"seen {seen}, expected user and assistant in turns")
        if turn.role == "user" and not turn.content.strip():
            raise BadRow("empty question")
        before = turn.role
    if chat[-1].role != "assistant":
        raise BadRow("wrong role order", "the last turn is no answer")
    if all(turn.says_nothing for turn in chat if turn.role == "assistant"):
        raise BadRow("empty answer")
