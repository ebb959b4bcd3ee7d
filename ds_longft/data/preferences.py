"""Preference pairs: a record as published sets lay it out -> `PreferenceRow`, the one row type of preference training.

On disk a pair is TRL's conversational form with an explicit prompt: `{"prompt": [messages], "chosen": [messages],
"rejected": [messages], "source", "language", "id", "weight"}`; `chosen` and `rejected` hold the answer turns alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from ds_longft.data.formats import language_of, text_of, turns_of, weight_of
from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.errors import DataError

PROMPT_KEYS = ("prompt", "question", "instruction", "input")


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

    @property
    def documents(self) -> tuple[Row, Row]:
        """The chosen and the rejected answer as complete rows; of the prompt, nothing is trained."""
        prompt = tuple(replace(turn, weight=0.0) for turn in self.prompt)
        chosen, rejected = (
            Row(prompt + answer, self.source, self.origin, self.language, self.weight)
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


def to_preference(record: dict[str, Any], *, source: str, origin: str) -> PreferenceRow:
    """`PreferenceRow` of a record with `chosen` and `rejected`. Raises `BadRow`.

    Layouts: orca_dpo_pairs (`system`, `question`, two texts), truthy-dpo and Chinese-dpo-pairs (`prompt`, `system`, two
    texts), ultrafeedback-binarized (`prompt`, two message lists that repeat the prompt), LLaMA-Factory
    (`conversations`, two single messages), and lists whose common beginning is the prompt.
    """
    chosen, rejected = (_answer(record.get(key), key) for key in ("chosen", "rejected"))
    prompt = _prompt(record)
    if not prompt:
        shared = sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(chosen, rejected, strict=False)))
        # Where one conversation is the other's beginning, its last answer is no prompt.
        prompt = chosen[: max(0, min(shared, len(chosen) - 1, len(rejected) - 1))]
    chosen, rejected = (_without_prompt(turns, prompt) for turns in (chosen, rejected))
    system = next((key for key in ("system", "system_prompt") if record.get(key)), None)
    if system is not None and (not prompt or prompt[0].role != "system"):
        prompt = [Turn("system", text_of(record[system], system)), *prompt]
    _check(prompt, chosen, rejected)
    own = record.get("source")
    return PreferenceRow(
        prompt=tuple(prompt),
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        source=text_of(own, "source") if isinstance(own, str) and own else source,
        origin=origin,
        language=language_of(record),
        weight=weight_of(record.get("weight"), "weight of the row"),
    )


def _prompt(record: dict[str, Any]) -> list[Turn]:
    """The turns that both answers answer; empty where the answers carry it themselves."""
    if isinstance(record.get("conversations"), list):
        return turns_of(record["conversations"], "from", "value")
    key = next((key for key in PROMPT_KEYS if record.get(key)), None)
    if key is None:
        return []
    value = record[key]
    return turns_of(value, "role", "content") if isinstance(value, list) else [Turn("user", text_of(value, key))]


def _answer(value: Any, what: str) -> list[Turn]:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return [Turn("assistant", text_of(value, what))]
    if value and isinstance(value[0], dict) and "from" in value[0]:
        return turns_of(value, "from", "value")
    return turns_of(value, "role", "content")


def _without_prompt(turns: list[Turn], prompt: list[Turn]) -> list[Turn]:
    """The answer turns of a list that may repeat the prompt, its system message or only its last question."""
    said = [(turn.role, turn.content) for turn in turns]
    for start in range(len(prompt)):
        end = [(turn.role, turn.content) for turn in prompt[start:]]
        if said[: len(end)] == end:
            return turns[len(end) :]
    return turns


def _check(prompt: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> None:
    chat = prompt[1:] if prompt and prompt[0].role == "system" else prompt
    if not chat:
        raise BadRow("no prompt", "neither a prompt column nor a common beginning of chosen and rejected")
    _check_turns(chat, "user", "the prompt")
    for turns, what in ((chosen, "chosen"), (rejected, "rejected")):
        if not turns:
            raise BadRow(f"{what} is empty")
        _check_turns(turns, "assistant", what)
    if [(t.role, t.content.strip()) for t in chosen] == [(t.role, t.content.strip()) for t in rejected]:
        raise BadRow("chosen and rejected are the same")


def _check_turns(turns: list[Turn], role: str, what: str) -> None:
    """`role` first and last, the two roles in turns, words in each."""
    other = "assistant" if role == "user" else "user"
    if len(turns) % 2 == 0 or any(turn.role != (role, other)[i % 2] for i, turn in enumerate(turns)):
        seen = " ".join(turn.role for turn in turns[:8])
        raise BadRow(f"wrong role order in {what}", f"seen {seen}, expected {role} first and last")
    if any(not turn.content.strip() for turn in turns):
        raise BadRow(f"{what} holds an empty message")
