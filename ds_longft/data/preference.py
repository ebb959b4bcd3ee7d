"""Preference rows: a dict as it lies in the file -> `Pair`, two rows with the same prompt.

Three layouts, told apart row by row: an explicit `prompt` with answers behind it, whole conversations that begin alike
(implicit prompt), and plain strings. What one answer may look like is decided by `formats.to_row`, as for SFT.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from ds_longft.data.formats import to_row
from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.errors import DataError

COLUMNS = {"chosen", "rejected"}


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer, each a complete row: prompt (never trained) and answer."""

    chosen: Row
    rejected: Row
    prompt_turns: int  # how many turns both begin with


def check_columns(columns: Iterable[str], path: str) -> None:
    """Raise `DataError` unless a source has the columns of preference data."""
    seen = set(columns)
    if not seen >= COLUMNS:
        raise DataError(
            f"{path}: objective is dpo, but the rows have the columns {', '.join(sorted(seen)) or '(none)'}. Expected "
            "prompt, chosen, rejected, or chosen and rejected alone that hold whole conversations; for answers without "
            "a preference set objective to sft"
        )


def to_pair(record: dict[str, Any], *, source: str, origin: str) -> Pair:
    """`Pair` of one record. Raises `BadRow`: an answer is missing, empty or equal to the other, prompts differ."""
    prompt, chosen, rejected = _parts(record)
    rows = []
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        laid_out = {**record, "prompt": prompt, "completion": answer}
        try:
            rows.append(to_row(laid_out, "prompt_completion", source=source, origin=origin))
        except BadRow as bad:
            raise BadRow(f"{side}: {bad.reason}", bad.detail) from bad
    common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(rows[0].turns, rows[1].turns, strict=False)))
    if _said(rows[0].turns) == _said(rows[1].turns):
        raise BadRow("chosen and rejected are equal")
    return Pair(rows[0], rows[1], common)


def _parts(record: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected), answers without the prompt."""
    prompt, chosen, rejected = record.get("prompt"), record.get("chosen"), record.get("rejected")
    if prompt is None:
        if not (isinstance(chosen, list) and isinstance(rejected, list)):
            raise BadRow("no prompt", "without one, chosen and rejected have to be lists of messages")
        same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        # Where one conversation is the other's beginning, its last answer is no prompt.
        same = min(same, len(chosen) - 1, len(rejected) - 1) if chosen and rejected else 0
        if same == 0:
            raise BadRow("prompts differ", "chosen and rejected begin with different messages")
        prompt = chosen[:same]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return prompt, _answer(chosen, asked), _answer(rejected, asked)


def _answer(answer: Any, prompt: Any) -> Any:
    """The messages behind the prompt, also where the prompt is repeated in front of them."""
    if not (isinstance(answer, list) and isinstance(prompt, list) and answer):
        return answer
    if [_plain(m) for m in answer[: len(prompt)]] == [_plain(m) for m in prompt]:
        return answer[len(prompt) :]
    role = answer[0].get("role") if isinstance(answer[0], dict) else None
    if role != "assistant":
        raise BadRow("prompts differ", f"an answer begins with a message of {role!r} that is not the prompt's")
    return answer


def _plain(message: Any) -> Any:
    return (message.get("role"), message.get("content")) if isinstance(message, dict) else message


def _said(turns: tuple[Turn, ...]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]
