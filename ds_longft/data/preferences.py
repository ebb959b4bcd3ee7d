"""Preference pairs: a record as published sets lay it out -> `PreferenceRow`, the one row type of preference training.

On disk a pair is TRL's conversational form with an explicit prompt: `{"prompt": [messages], "chosen": [messages],
"rejected": [messages], "source", "language", "id", "weight"}`; `chosen` and `rejected` hold the answer turns alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from ds_longft.data.columns import ASKED, Columns
from ds_longft.data.formats import FOLLOWS, asked, language_of, system_of, tools_in
from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.data.turns import text_of, turns_of, weight_of
from ds_longft.errors import DataError

PREFERENCE = "preference"
"""The layout of pairs, beside those of `formats.FORMATS`."""


@dataclass(frozen=True)
class PreferenceRow:
    """One prompt with a better and a worse answer."""

    prompt: tuple[Turn, ...]  # ends with a user turn
    chosen: tuple[Turn, ...]  # answer turns: begins and ends with the assistant
    rejected: tuple[Turn, ...]
    source: str
    origin: str  # "file:number"
    language: str | None = None
    weight: float = 1.0
    tools: str = ""  # as in `Row`
    unused: tuple[str, ...] = ()  # as in `Row`

    @property
    def documents(self) -> tuple[Row, Row]:
        """The chosen and the rejected answer as complete rows; of the prompt, nothing is trained."""
        prompt = tuple(replace(turn, weight=0.0) for turn in self.prompt)
        chosen, rejected = (
            Row(prompt + answer, self.source, self.origin, self.language, self.weight, self.tools, self.unused)
            for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


def is_preference(columns: Iterable[str]) -> bool:
    """Whether records with these columns are pairs."""
    return {"chosen", "rejected"} <= set(columns)


def check_columns(columns: Iterable[str], path: str) -> None:
    """Raise `DataError` unless a source has the columns of preference data."""
    if not is_preference(columns):
        raise DataError(
            f"{path}: objective is dpo, but the rows have the columns {', '.join(sorted(columns)) or '(none)'}. "
            "Expected prompt, chosen, rejected, or chosen and rejected alone that hold whole conversations; for "
            "answers without a preference set objective to sft"
        )


def to_preference(record: Mapping[str, Any], *, source: str, origin: str) -> PreferenceRow:
    """`PreferenceRow` of a record with `chosen` and `rejected`. Raises `BadRow`.

    Layouts: orca_dpo_pairs (`system`, `question`, two texts), truthy-dpo and Chinese-dpo-pairs (`prompt`, `system`, two
    texts), ultrafeedback-binarized (`prompt`, two message lists that repeat the prompt), alpaca (`instruction`,
    `input`, `history`, two texts), LLaMA-Factory (`conversations`, two single messages), and lists whose common
    beginning is the prompt, also beside a `prompt` that says a part of it again.
    """
    columns, unused = Columns(record), set[str]()
    chosen, rejected = (_answer(columns.get(key), key, unused) for key in ("chosen", "rejected"))
    prompt, chosen, rejected = _parted(_prompt(columns, unused), chosen, rejected)
    prompt = system_of(columns, prompt)
    _check(prompt, chosen, rejected)
    own, language = columns.get("source"), language_of(columns)
    return PreferenceRow(
        prompt=tuple(prompt), chosen=tuple(chosen), rejected=tuple(rejected),
        source=text_of(own, "source") if isinstance(own, str) and own else source, origin=origin, language=language,
        weight=weight_of(columns.get("weight"), "weight of the row"), tools=tools_in(columns),
        unused=tuple(sorted(unused | set(columns.unused))),
    )  # fmt: skip


def _prompt(columns: Columns, unused: set[str]) -> list[Turn]:
    """The turns that both answers answer; empty where the answers carry it themselves."""
    if columns.has("conversations"):
        value = columns.get("conversations")
        return turns_of(value, unused) if isinstance(value, list) else [Turn("user", text_of(value, "conversations"))]
    key = columns.first(*ASKED)
    return asked(columns, key, unused) if key else []


def _answer(value: Any, what: str, unused: set[str]) -> list[Turn]:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [Turn("assistant", text_of(value, what))]
    return turns_of(value, unused)


def _parted(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> tuple[list[Turn], list[Turn], list[Turn]]:
    """(what both answer, the two answers): what the lists begin with alike belongs to the prompt, said once."""
    chosen, rejected = (_without(prompt, turns) for turns in (chosen, rejected))
    alike = sum(1 for _ in takewhile(lambda ab: _said(ab[0]) == _said(ab[1]), zip(chosen, rejected, strict=False)))
    # Where one conversation is the other's beginning, its last answer is no prompt; nor is an answer ever its end.
    alike = max(0, min(alike, len(chosen) - 1, len(rejected) - 1))
    while alike and chosen[alike - 1].role == "assistant":
        alike -= 1
    shared = chosen[:alike]
    if shared and shared[0].role in ("system", "user"):
        told = [_said(turn) for turn in shared]
        prompt = [turn for turn in prompt if _said(turn) not in told]  # a column that says a part of it again
        if any(turn.role != "system" for turn in prompt):
            raise BadRow("the prompt is not in what chosen and rejected begin with", prompt[-1].content[:60])
    return [*prompt, *shared], chosen[alike:], rejected[alike:]


def _without(prompt: list[Turn], turns: list[Turn]) -> list[Turn]:
    """The turns of a list that may repeat the prompt, all of it or from some turn on, as its beginning."""
    said = [_said(turn) for turn in turns]
    for start in range(len(prompt)):
        end = [_said(turn) for turn in prompt[start:]]
        if said[: len(end)] == end:
            return turns[len(end) :]
    return turns


def _said(turn: Turn) -> tuple[Any, ...]:
    """What a turn says, blanks around it aside: columns that repeat one often differ in those."""
    return turn.role, turn.content.strip(), turn.thinking.strip(), [(call.name, call.arguments) for call in turn.calls]


def _check(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> None:
    chat = prompt[1:] if prompt and prompt[0].role == "system" else prompt
    if not chat:
        raise BadRow("no prompt", "neither a prompt column nor a common beginning of chosen and rejected")
    _check_turns(chat, "start", ("user", "tool"), "the prompt")
    for turns, what in ((chosen, "chosen"), (rejected, "rejected")):
        if not turns:
            raise BadRow(f"{what} is empty")
        _check_turns(turns, "user", ("assistant",), what)
    if [_said(turn) for turn in chosen] == [_said(turn) for turn in rejected]:
        raise BadRow("chosen and rejected are the same")


def _check_turns(turns: list[Turn], before: str, last: tuple[str, ...], what: str) -> None:
    """The roles in turns, the last one of `last`, words in each turn."""
    seen = " ".join(turn.role for turn in turns[:8])
    for turn in turns:
        if turn.role not in FOLLOWS[before]:
            raise BadRow(f"wrong role order in {what}", f"seen {seen}")
        before = turn.role
    if turns[-1].role not in last:
        raise BadRow(f"wrong role order in {what}", f"seen {seen}, expected {' or '.join(last)} last")
    if any(turn.says_nothing for turn in turns):
        raise BadRow(f"{what} holds an empty message")
