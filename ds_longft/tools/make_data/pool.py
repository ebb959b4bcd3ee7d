"""Every usable row of a mix's sources, on disk, with what decides about it in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ds_longft.config.data_keys import SourceConfig, is_pattern
from ds_longft.data.formats import to_row
from ds_longft.data.ledger import Entry, Ledger
from ds_longft.data.preferences import PREFERENCE
from ds_longft.data.readers import find_source
from ds_longft.data.rows import BadRow, Row
from ds_longft.errors import DataError
from ds_longft.tools.make_data.convert import GAIN, layout_of, usable_records
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.recipe import OF_NO_SET, MixSource, Recipe
from ds_longft.tools.make_data.similar import anchors, signature
from ds_longft.tools.make_data.synth.agents import MOST_TOKENS_OF_FILE, agent_rows
from ds_longft.tools.make_data.synth.code import CHARS_PER_TOKEN, Part, code_rows
from ds_longft.tools.make_data.synth.lists import list_rows
from ds_longft.tools.make_data.synth.needle_rows import needle_rows
from ds_longft.tools.make_data.synth.negatives import PART_TOKENS, negative_rows
from ds_longft.tools.make_data.synth.refgpt8x import hide_references
from ds_longft.tools.make_data.synth.row_plan import Wanted
from ds_longft.tools.make_data.synth.sources import Dialogue, Document, read_dialogues, read_documents
from ds_longft.tools.make_data.synth.stretches import BETWEEN, stretch_rows
from ds_longft.tools.make_data.where import number_of

QUESTIONS = 3  # about one context
AGENTS_SPAN = 8  # the longest trajectory of an agent over the shortest
MEASURED_TOGETHER = 64  # rows; the tokenizer works on them in parallel


@dataclass(frozen=True, slots=True, eq=False)
class PooledRow:
    """What decides about a row, and tells it from others. The row itself waits on disk."""

    at: int  # where it begins in the file
    source: str
    origin: str
    language: str
    tokens: int
    is_text: bool
    gain: float  # of long context; -inf where nobody has said
    part: str  # "train" or "eval" where it is decided already, else ""
    anchors: NDArray[np.uint64]
    signature: NDArray[np.uint64]


def fill_pool(
    recipe: Recipe, file: Path, ledger: Ledger, lengths: Lengths, *, root: Path | None, progress: bool
) -> list[PooledRow]:
    """Read or make the rows of every source, and write them to `file`, one JSON object a line. Rows that are unusable,
    or too long, are listed in the ledger.

    Raises:
        DataError: a source is not found, holds preference pairs, or has too many bad rows.
    """
    pool: list[PooledRow] = []
    with file.open("wb") as out:
        for source in recipe.sources:
            bad_before, read_before = ledger.tally.unusable_rows, ledger.tally.read
            records = _records(source, recipe, ledger, lengths, root, progress)
            while batch := list(islice(records, MEASURED_TOGETHER)):
                _add(pool, out, batch, source, recipe, ledger, lengths)
            bad, read = ledger.tally.unusable_rows - bad_before, ledger.tally.read - read_before
            if bad > recipe.max_bad_fraction * max(read, 1):
                raise DataError(
                    f"source {source.name}: {bad} of {read} rows are unusable, more than max_bad_fraction allows "
                    f"({recipe.max_bad_fraction:.1%}); each is listed in {ledger.path}"
                )
    return pool


def _records(
    source: MixSource, recipe: Recipe, ledger: Ledger, lengths: Lengths, root: Path | None, progress: bool
) -> Iterator[tuple[dict[str, Any], str]]:
    """(row as on disk, part) of a source; made rows are made of held-out texts or of the others, never of both."""
    if source.synth == "none":
        found = find_source(local(source, root))
        layout = layout_of(found)
        if layout == PREFERENCE:
            raise DataError(f"source {source.name} holds preference pairs: convert them with `ds-longft data convert`")
        as_they_are = usable_records(found, layout, ledger, name=source.name, where=source.filter, progress=progress)
        yield from ((record, "") for record in as_they_are)
        return
    made_of: Sequence[Document | Dialogue] = []
    if source.synth not in OF_NO_SET:
        read = read_dialogues if source.synth == "refgpt8x" else read_documents
        made_of = read(local(source, root), ledger, source.filter)
    rows = recipe.made_rows(source)
    held_out = round(rows * recipe.held_out)
    counts: dict[Part, int] = {"train": rows - held_out, "eval": held_out}
    for part, count in counts.items():
        own = [one for one in made_of if _is_held_out(one.text, recipe.held_out) == (part == "eval")]
        take = min(len(own), count) if source.synth == "refgpt8x" else count
        if not take or not (own or source.synth in OF_NO_SET):
            continue
        wanted = Wanted(take, source.context_tokens or recipe.max_length_tokens, recipe.seed, source.name, lengths)
        try:
            for record in _made(source, recipe, wanted, own, part, first=0 if part == "train" else counts["train"]):
                yield record, part
        except DataError:
            if part == "train" or not own:
                raise  # a few held-out texts may well be too short


def _made(
    source: MixSource, recipe: Recipe, wanted: Wanted, texts: Sequence[Any], part: Part, *, first: int
) -> Iterator[dict[str, Any]]:
    """Samples of one part; `first`: the number of the first of them."""
    questions, separator = source.questions or QUESTIONS, BETWEEN if source.separator is None else source.separator
    match source.synth:
        case "refgpt8x":
            return hide_references(texts, rows=wanted.rows, seed=wanted.seed, name=wanted.name)
        case "needle":
            return needle_rows(texts, wanted, questions=questions)
        case "negatives":
            return negative_rows(texts, wanted, part_tokens=source.part_tokens or PART_TOKENS, separator=separator)
        case "stretches":
            languages = recipe.languages if source.languages is None else source.languages
            return stretch_rows(texts, wanted, languages=languages, sizes=source.sizes, separator=separator)
        case "lists":
            return list_rows(wanted, questions=questions, sizes=source.sizes, first=first)
        case "code":
            if not wanted.lengths.exact:
                wanted = replace(wanted, lengths=Lengths(chars_per_token=CHARS_PER_TOKEN))
            return code_rows(wanted, questions=questions, part=part)
    shortest = wanted.context_tokens // AGENTS_SPAN
    room = wanted.context_tokens - MOST_TOKENS_OF_FILE  # the last file that is read may go beyond the length
    if room < shortest:
        least = MOST_TOKENS_OF_FILE * AGENTS_SPAN // (AGENTS_SPAN - 1)
        raise DataError(f"source {source.name}: trajectories need context_tokens of {least:,} or more")
    return agent_rows(replace(wanted, context_tokens=room), shortest_tokens=shortest, first=first)


def local(source: MixSource, root: Path | None) -> SourceConfig:
    """The source with its path below `root`, where there is something.

    Tried are `root`/path (for a pattern this alone), `root`/path.* and, so that files can stand in for hub ids,
    `root`/name and `root`/name.*.
    """
    if root is None or Path(source.path).is_absolute():
        return source
    if is_pattern(source.path):
        return source.model_copy(update={"path": str(root / source.path)})
    for stem in (source.path, source.name):
        found = [root / stem, *sorted((root / stem).parent.glob(f"{Path(stem).name}.*"))]
        path = next((path for path in found if path.exists()), None)
        if path is not None:
            of_hub = {} if path.is_dir() else {"split": "train", "subset": None, "revision": None}  # a file has none
            return source.model_copy(update={"path": str(path), **of_hub})
    return source


def _is_held_out(text: str, held_out: float) -> bool:
    """Decided by the text alone, so that a text has the same part in every source."""
    return crc32(text[:4000].encode("utf-8", "replace")) < held_out * 2**32


def _add(
    pool: list[PooledRow],
    out: IO[bytes],
    batch: Sequence[tuple[dict[str, Any], str]],
    source: MixSource,
    recipe: Recipe,
    ledger: Ledger,
    lengths: Lengths,
) -> None:
    """Measure rows and put them into the pool; those too long go to the ledger."""
    nothing = np.zeros(0, dtype=np.uint64)
    rows = [to_row(r, "text" if "text" in r else "messages", source=source.name, origin="") for r, _ in batch]
    for (record, part), row, tokens in zip(batch, rows, _measured(rows, lengths), strict=True):
        origin = f"{source.name}:{record.get('id', len(pool) + 1)}"
        if isinstance(tokens, BadRow):
            ledger.add(Entry.of(origin, tokens))
            continue
        if tokens > recipe.max_length_tokens:
            detail = f"{tokens} tokens, the limit is {recipe.max_length_tokens}"
            ledger.add(Entry(origin, "too long", detail, "overlong"))
            continue
        pool.append(
            PooledRow(
                at=out.tell(),
                source=source.name,
                origin=origin,
                language=row.language or "und",
                tokens=tokens,
                is_text=row.is_text,
                gain=number_of(record, GAIN),
                part=part,
                anchors=anchors(row.turns) if recipe.held_out else nothing,
                signature=signature(row.turns) if recipe.near_duplicates is not None else nothing,
            )
        )
        out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _measured(rows: Sequence[Row], lengths: Lengths) -> list[int | BadRow]:
    """Tokens of each row, or why it has none."""
    try:
        return list(lengths.rows([row.turns for row in rows], [row.tools for row in rows]))
    except BadRow:
        measured: list[int | BadRow] = []
        for row in rows:
            try:
                measured += lengths.rows([row.turns], [row.tools])
            except BadRow as bad:
                measured.append(bad)
        return measured
