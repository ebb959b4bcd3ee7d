"""Any readable set -> JSONL of one row type: chats as `messages`, plain text as `text`, pairs as preference rows.

What every later step relies on is made certain here: valid roles and text, a source name, a language, ids that do not
repeat. Rows that cannot be used are listed in a ledger beside the output.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.blocks import parse_block
from ds_longft.data.formats import TOKEN_GAINS, detect_format, to_row
from ds_longft.data.ledger import Entry, Ledger, Tally
from ds_longft.data.preferences import PREFERENCE, PreferenceRow, is_preference, to_preference
from ds_longft.data.progress import Progress, say_once
from ds_longft.data.readers import Source, find_source, first_record
from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.errors import DataError
from ds_longft.tools.make_data.language import detect_language
from ds_longft.tools.make_data.where import EVERY_ROW, Where

T = TypeVar("T")

GAIN = "context_gain"  # column that `ds-longft data score` writes and `choose` of a recipe reads


class Repeated(BadRow):
    """A row with the id of an earlier row."""

    kind = "repeated"


@dataclass(frozen=True)
class Converted:
    """What was written."""

    path: str
    ledger: str
    format: str
    tally: Tally
    languages: dict[str, int]  # code -> rows


def convert_set(
    config: SourceConfig, path: str | Path, *, name: str, max_bad_fraction: float, progress: bool = False
) -> Converted:
    """Write the usable rows of a source to the JSONL file `path`, and the others to `path`.ledger.jsonl.

    Each row gets `source` = `name`, and the language it names, or the one detected.

    Raises:
        DataError: nothing found or usable, or more than `max_bad_fraction` of the rows are bad. Then no file is left.
    """
    source = find_source(config)
    if source.remark:
        say_once(source.remark)
    layout = layout_of(source)
    ledger = Path(f"{path}.ledger.jsonl")
    languages: dict[str, int] = {}
    with written_whole(Path(path)) as file, Ledger(ledger) as book:
        for record in usable_records(source, layout, book, name=name, progress=progress):
            languages[record["language"]] = languages.get(record["language"], 0) + 1
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        book.tally.check(max_bad_fraction, ledger)
    return Converted(str(path), str(ledger), layout, book.tally, languages)


def layout_of(source: Source) -> str:
    """The layout of a source: as configured, or recognised by its first readable record. Raises `DataError`."""
    if source.config.format != "auto":
        return source.config.format
    record = first_record(source)
    return PREFERENCE if is_preference(record) else detect_format(record, source.config.path)


def usable_records(
    source: Source, layout: str, ledger: Ledger, *, name: str, where: Where = EVERY_ROW, progress: bool = False
) -> Iterator[dict[str, Any]]:
    """Every usable row that `where` takes, as it is written to disk.

    Memory: one block of rows, and 8 bytes of digest for each row that has an id.
    """
    ids: set[int] = set()

    def written(record: dict[str, Any], origin: str) -> dict[str, Any]:
        # The id comes second: a row that is not used does not take it from a later one.
        made, unused = _on_disk(record, layout, name, origin)
        made |= _identity(record, ids)
        for what in unused:
            ledger.tally.unused[what] = ledger.tally.unused.get(what, 0) + 1
        return made

    return made_of_rows(source, written, ledger, where, name=name, progress=progress)


def made_of_rows(
    source: Source, make: Callable[[dict[str, Any], str], T], ledger: Ledger, where: Where, *, name: str, progress: bool
) -> Iterator[T]:
    """What `make` makes of each record that `where` takes, and of where it stands; those of which it makes a `BadRow`
    are counted and listed.

    Raises:
        DataError: `where` takes none.
    """
    tally, before = ledger.tally, ledger.tally.usable
    with Progress(f"reading {name}", source.size_bytes, show=progress) as bar:
        for block in source.blocks():
            for origin, record in parse_block(block):
                if isinstance(record, dict) and not where.takes(record):
                    continue
                tally.read += 1
                try:
                    if isinstance(record, BadRow):
                        raise record
                    made = make(record, origin)
                except BadRow as bad:
                    ledger.add(Entry.of(origin, bad))
                    continue
                tally.usable += 1
                yield made
            bar.update(block.position_bytes, f"{tally.usable:,} rows")
    if tally.usable == before and where != EVERY_ROW:
        raise DataError(f"{source.config.path} holds no row that is taken by {where}: correct the column or the value")


def _identity(record: dict[str, Any], seen: set[int]) -> dict[str, str]:
    """{"id": ...} of a record that has one. Raises `Repeated` where an earlier record had it."""
    given = record.get("id")
    if not isinstance(given, str | int) or given == "":
        return {}
    name = str(given).encode("utf-8", "replace").decode()
    digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    if digest in seen:
        raise Repeated("an earlier row has the same id", name[:100])
    seen.add(digest)
    return {"id": name}


def _on_disk(record: dict[str, Any], layout: str, name: str, origin: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the row as it is written, what the record holds beside it)."""
    row: Row | PreferenceRow
    if layout == PREFERENCE:
        row = to_preference(record, source=name, origin=origin)
        turns = (*row.prompt, *row.chosen)
        content: dict[str, Any] = {
            part: [_message(turn) for turn in getattr(row, part)] for part in ("prompt", "chosen", "rejected")
        }
    else:
        row = to_row(record, layout, source=name, origin=origin)
        turns = row.turns
        content = {"text": turns[0].content} if row.is_text else {"messages": [_message(turn) for turn in turns]}
    # The set's own sub-source is kept beside the name, which says what was downloaded.
    part = {"part": row.source} if row.source != name else {}
    weight = {"weight": row.weight} if row.weight != 1 else {}
    language = row.language or detect_language(turns)
    tools = {"tools": json.loads(row.tools)} if row.tools else {}
    gain = {name: record[name] for name in (GAIN, TOKEN_GAINS) if name in record}
    unused = tuple(what for what in row.unused if what not in gain)
    return {**content, **tools, "source": name, **part, "language": language, **weight, **gain}, unused


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.thinking:
        message["reasoning_content"] = turn.thinking
    if turn.calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            | ({"id": call.id} if call.id else {})
            for call in turn.calls
        ]
    if turn.role == "assistant" and turn.weight != 1:
        message["weight"] = turn.weight
    return message | {k: v for k, v in {"name": turn.name, "tool_call_id": turn.call_id}.items() if v}


@contextmanager
def written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under its name when all of it is written, and not at all when something failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("w", encoding="utf-8") as file:
            yield file
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
