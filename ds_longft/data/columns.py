"""Which columns a record may have, layout by layout: the one list behind detection, reading and docs/data.md.

A column of a record is read by its layout, or is bookkeeping, or is counted as unused and named to the user. Nothing is
dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""What a row is about where these hold something; its text alone would teach to answer without looking."""

EVERY_ROW = ("source", "language", "lang", "weight")  # read in every layout
EVERY_CHAT = ("system", "system_prompt", "tools", "functions")  # and these in every layout but plain text

# Columns, and keys of messages, that name, count or grade a row and hold nothing a model could learn from.
BOOKKEEPING = frozenset((
    "id", "idx", "index", "uuid", "uid", "hash", "length", "lengths", "file", "filename", "file_name", "path", "url",
    "urls", "origin", "category", "categories", "topic", "topics", "tag", "tags", "title", "type", "kind", "task",
    "task_type", "dataset", "dataset_name", "subset", "split", "version", "license", "author", "authors", "user",
    "user_id", "username", "model", "models", "generator", "annotator", "score", "scores", "rating", "ratings",
    "quality", "difficulty", "reward", "rewards", "timestamp", "date", "time", "created", "created_at", "updated_at",
    "meta", "metadata", "part", "turns", "num_turns", "rank", "seed", "views", "skip_prompt_formatting", "avatarurl",
    "name_str", "custom_instruction",
))  # fmt: skip
_BOOKKEEPING = re.compile(
    r".*[_-](id|ids|idx|hash|url|urls|score|scores|rating|ratings|reward|rewards|model|models|length|len|tokens|"
    r"timestamp|date|at|uuid|count|license|version)|(id|idx|num|n|count|total|score|origin|model|meta)[_-].*"
)


@dataclass(frozen=True)
class Layout:
    """One way to lay out a record."""

    format: str  # as `data.train[].format` names it
    needs: tuple[str, ...]  # columns that give it away
    also: tuple[str, ...] = ()  # columns it reads beside these and those of every row

    @property
    def columns(self) -> frozenset[str]:
        """All columns that are read."""
        of_chats = () if self.format == "text" else EVERY_CHAT
        return frozenset((*self.needs, *self.also, *EVERY_ROW, *of_chats))


ASKED = ("prompt", "question", "instruction", "query", "input")
ASKED_MORE = ("input", "context", "history")  # behind the question, behind the question, before it

# In the order they are tried.
LAYOUTS = (
    Layout("preference", ("chosen", "rejected"), (*ASKED, *ASKED_MORE, "conversations")),
    Layout("grounded", ("reference", "dialogue")),
    Layout("grounded", ("reference", "messages")),
    Layout("grounded", ("document", "question", "answer")),
    Layout("grounded", ("context", "qas")),
    Layout("grounded", ("context", "question", "answer")),
    Layout("longalign", ("messages", "length")),
    Layout("messages", ("messages",)),
    Layout("longalign", ("messages",)),  # never recognised, but given as data.train[].format
    Layout("sharegpt", ("conversations",)),
    Layout("alpaca", ("instruction", "output"), ASKED_MORE),
    Layout("alpaca", ("instruction", "response"), ASKED_MORE),
    Layout("prompt_completion", ("prompt", "completion"), ASKED_MORE),
    Layout("prompt_completion", ("prompt", "response"), ASKED_MORE),
    Layout("prompt_completion", ("query", "response"), ASKED_MORE),
    Layout("prompt_completion", ("question", "answer"), ASKED_MORE),
    Layout("prompt_completion", ("input", "output"), ASKED_MORE[1:]),
    Layout("text", ("text",)),
)


class Columns:
    """A record, and which of its columns have been read. Raises `BadRow` where it holds images, video or sound."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        for column in MEDIA:
            if _holds(record.get(column)):
                raise BadRow(f"{column} beside the text", "only text is trained: leave such rows out")
        self._record = record
        self.read: set[str] = set(EVERY_ROW)

    def get(self, column: str) -> Any:
        """The value of a column, None where there is none. The column counts as read."""
        self.read.add(column)
        return self._record.get(column)

    def has(self, *columns: str) -> bool:
        """Whether each of these columns holds something. Reads nothing."""
        return not any(is_blank(self._record.get(column)) for column in columns)

    def first(self, *columns: str) -> str | None:
        """The first of these columns that holds something."""
        return next((column for column in columns if self.has(column)), None)

    @property
    def unused(self) -> list[str]:
        """Columns that hold something, were not read and are no bookkeeping."""
        return unused_keys(self._record, self.read)


def is_blank(value: Any) -> bool:
    """Null, an empty text or an empty list: a column that holds nothing."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _holds(value: Any) -> bool:
    """Whether there is anything in it, at any depth: mixed sets have `[]` or `{"bytes": null}` in rows of text."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
    return any(map(_holds, parts)) if parts is not None else value is not None and value is not False and value != ""


def unused_keys(record: Mapping[str, Any], read: Iterable[str]) -> list[str]:
    """Keys of a record or a message that hold something, are not among `read` and are no bookkeeping."""
    return [key for key, value in record.items() if key not in read and not is_blank(value) and not is_bookkeeping(key)]


def is_bookkeeping(key: str) -> bool:
    """Whether a column names, counts or grades its row."""
    plain = key.lower()
    return plain in BOOKKEEPING or _BOOKKEEPING.fullmatch(plain) is not None


def layout_of(record: Mapping[str, Any], format: str) -> Layout:
    """The layout of one record of a source laid out as `format`: the source's where the record has its columns, else
    the record's own, so that one file may hold several kinds; the source's too where the record fits none.
    """
    holds = {column for column, value in record.items() if not is_blank(value)}
    of_format = [layout for layout in LAYOUTS if layout.format == format]
    own = [layout for layout in LAYOUTS if layout.format != "preference"] if format != "preference" else []
    tried = ((holds, of_format), (holds, own), (set(record), of_format))
    fitting = (layout for columns, layouts in tried for layout in layouts if columns >= set(layout.needs))
    return next(fitting, of_format[0])


def detect_format(record: Mapping[str, Any] | Iterable[str], path: str) -> str:
    """Name of the layout of a record (or of these columns); `DataError` naming the columns when none has them.

    Columns that hold something decide; those that hold nothing where these do not.
    """
    columns = set(record)
    holds = {c for c in columns if not is_blank(record[c])} if isinstance(record, Mapping) else columns
    for seen in (holds, columns):
        if {"chosen", "rejected"} <= seen:
            raise DataError(
                f"{path} holds preference pairs (columns chosen, rejected), but objective is sft: set objective to dpo"
            )
        for layout in LAYOUTS:
            if set(layout.needs) <= seen:
                return layout.format
    chats = [layout for layout in LAYOUTS if layout.format != "preference"]
    known = "; ".join(f"{layout.format}: {', '.join(sorted(layout.needs))}" for layout in chats)
    raise DataError(
        f"{path}: no known row layout has the columns {', '.join(sorted(columns)) or '(none)'}. Expected one of: "
        f"{known}. Say which is which with data.train[].columns, as {{their_name: name_of_a_layout}}, or set "
        "data.train[].format of this source if the first row is an exception"
    )
