"""The files a run leaves, read back: one reader, with the shapes of `run_files`, for whatever may stand there by now.

A power cut leaves NULs, a full disk half a line, a newer version other keys, a user anything. What does not fit its
schema is `Unreadable`, in words; the reader decides how to go on without it. Nobody else parses these files.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter, ValidationError

T = TypeVar("T")

WORDS_MAX = 60  # of what was seen, in a message


class Unreadable(Exception):
    """A file, or a line of one, that is not what was written there; the text says which and why."""


def read_file(path: Path, schema: type[T]) -> T:
    """The content of a JSON file. Raises Unreadable: it is missing, or holds anything but that."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read ({error.strerror or error})") from None
    return _parsed(content, schema, path.name)


def read_if_good(path: Path, schema: type[T]) -> T | None:
    """The content of a JSON file, None where it is missing or garbage: for readers that can do without it."""
    try:
        return read_file(path, schema)
    except Unreadable:
        return None


def read_lines(path: Path, schema: type[BaseModel]) -> tuple[list[dict[str, Any]], list[str]]:
    """Every line of a file that fits the schema, as it was written, and what is wrong with each that does not.

    A last line without its end was cut by a crash, or is being written: nothing is wrong with it. A file that is not
    there has no lines.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{path.name} cannot be read ({error.strerror or error})"]
    good, bad = [], []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line:
            break
        try:
            record = _parsed(line, schema, f"line {number}").model_dump(exclude_unset=True)
            good.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()})
        except Unreadable as error:
            if number < len(lines):
                bad.append(f"{path.name}: {error}")
    return good, bad


def _parsed(content: bytes, schema: type[T], name: str) -> T:
    try:
        return cast(T, _adapter(cast(Any, schema)).validate_json(content, strict=True))
    except (ValidationError, RecursionError) as error:
        words = _words(error) if isinstance(error, ValidationError) else "nested too deep"
        raise Unreadable(f"{name}: {words}") from None


@lru_cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _words(error: ValidationError) -> str:
    """The first thing that is wrong, and where; a key that nobody here writes is a newer version's."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"holds {where}, which this version does not know: written by a newer one"
    said = first["msg"].removeprefix("Value error, ")
    seen = "" if first["type"] in ("json_invalid", "missing") else f", seen {str(first['input'])[:WORDS_MAX]}"
    return f"{where}: {said}{seen}" if where else f"{said}{seen}"
