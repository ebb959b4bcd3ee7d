"""`Pool`: every usable row of a mix's sources, on disk, with what decides about it in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ds_longft.config.run_config import SourceConfig, is_pattern
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
from ds_longft.tools.make_data.synth.sources import Document, read_dialogues, read_documents
from ds_longft.tools.make_data.synth.stretches import BETWEEN, stretch_rows
from ds_longft.tools.make_data.where import number_of

QUESTIONS = 3  # about one context
AGENTS_SPAN = 8  # the longest trajectory of an agent over the shortest
MEASURED_TOGETHER = 64  # rows; the tokenizer works on them in parallel


@dataclass
class Pool:
    """Rows by number; the rows themselves lie in `file`, one JSON object a line."""

    file: Path
    at: list[int] = field(default_factory=list)  # where each row begins
    source: list[str] = field(default_factory=list)
    origin: list[str] = field(default_factory=list)
    language: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    is_text: list[bool] = field(default_factory=list)
    gain: list[float] = field(default_factory=list)  # of long context; -inf where nobody has said
    part: list[str] = field(default_factory=list)  # "train" or "eval" where it is decided already, else ""
    anchors: list[NDArray[np.uint64]] = field(default_factory=list)
    signatures: list[NDArray[np.uint64]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.at)

    def records(self, rows: Iterable[int]) -> Iterator[str]:
        """The lines of these rows, in this order."""
        with self.file.open("rb") as file:
            for row in rows:
                file.seek(self.at[row])
                yield file.readline().decode()


def fill_pool(
    recipe: Recipe, file: Path, ledger: Ledger, lengths: Lengths, *, root: Path | None, progress: bool
) -> Pool:
    """Read or make the rows of every source. Rows that are unusable, or too long, are listed in the ledger.

    Raises:
        DataError: a source is not found, holds preference pairs, or has too many bad rows.
    """
    pool = Pool(file)
    with file.open("wb") as out:
        for source in recipe.sources:
            bad_before, read_before = ledger.tally.unusable_rows, ledger.tally.read
            batch: list[tuple[dict[str, Any], str]] = []
            for record, part in _records(source, recipe, ledger, lengths, root, progress):
                batch.append((record, part))
                if len(batch) == MEASURED_TOGETHER:
                    _add(pool, out, batch, source, recipe, ledger, lengths)
                    batch = []
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
    if source.synth in OF_NO_SET:
        yield from _out_of_nothing(source, recipe, lengths)
        return
    found = local(source, root)
    if source.synth == "none":
        where = find_source(found)
        layout = layout_of(where)
        if layout == PREFERENCE:
            raise DataError(f"source {source.name} holds preference pairs: convert them with `ds-longft data convert`")
        taken = 0
        for record in usable_records(where, layout, ledger, name=source.name, where=source.filter, progress=progress):
            yield record, ""
            taken += 1
        source.filter.refuse_nothing(taken, source.path)
        return
    rows, held_out = recipe.made_rows(source), recipe.held_out
    if source.synth == "refgpt8x":
        dialogues = read_dialogues(found, ledger, source.filter)
        for part in ("train", "eval"):
            own = [d for d in dialogues if (_is_held_out(d.reference, held_out)) == (part == "eval")]
            count = min(len(own), _count(rows, held_out, part))
            made = hide_references(own, rows=count, seed=recipe.seed, name=source.name) if count else iter(())
            yield from ((record, part) for record in made)
        return
    documents = read_documents(found, ledger, source.filter)
    for part in ("train", "eval"):
        texts = [d for d in documents if _is_held_out(d.text, held_out) == (part == "eval")]
        count = _count(rows, held_out, part)
        if not texts or not count:
            continue
        try:
            yield from ((record, part) for record in _about_texts(texts, count, source, recipe, lengths))
        except DataError:
            if part == "train":
                raise  # a few held-out texts may well be too short


def _about_texts(
    texts: Sequence[Document], rows: int, source: MixSource, recipe: Recipe, lengths: Lengths
) -> Iterator[dict[str, Any]]:
    """Samples made of documents."""
    every: dict[str, Any] = {
        "rows": rows,
        "context_tokens": source.context_tokens or recipe.max_length_tokens,
        "seed": recipe.seed,
        "name": source.name,
        "lengths": lengths,
    }
    if source.synth == "needle":
        return needle_rows(texts, questions=source.questions or QUESTIONS, **every)
    every["separator"] = BETWEEN if source.separator is None else source.separator
    if source.synth == "negatives":
        return negative_rows(texts, part_tokens=source.part_tokens or PART_TOKENS, **every)
    every |= {"languages": recipe.languages if source.languages is None else source.languages, "sizes": source.sizes}
    return stretch_rows(texts, **every)


def _out_of_nothing(source: MixSource, recipe: Recipe, lengths: Lengths) -> Iterator[tuple[dict[str, Any], str]]:
    """Samples that are made of no set."""
    parts: tuple[Part, Part] = ("train", "eval")
    longest = source.context_tokens or recipe.max_length_tokens
    rows = {part: _count(recipe.made_rows(source), recipe.held_out, part) for part in parts}
    for part in parts:
        every: dict[str, Any] = {"rows": rows[part], "seed": recipe.seed, "name": source.name}
        first = rows["train"] if part == "eval" else 0
        if source.synth == "agents":
            shortest = longest // AGENTS_SPAN
            room = longest - MOST_TOKENS_OF_FILE  # the last file that is read may go beyond the length
            if room < shortest:
                least = MOST_TOKENS_OF_FILE * AGENTS_SPAN // (AGENTS_SPAN - 1)
                raise DataError(f"source {source.name}: trajectories need context_tokens of {least:,} or more")
            made = agent_rows(shortest_tokens=shortest, longest_tokens=room, lengths=lengths, first=first, **every)
        elif source.synth == "lists":
            every |= {"questions": source.questions or QUESTIONS, "sizes": source.sizes, "first": first}
            made = list_rows(context_tokens=longest, lengths=lengths, **every)
        else:
            ruler = lengths if lengths.exact else Lengths(chars_per_token=CHARS_PER_TOKEN)
            questions = source.questions or QUESTIONS
            made = code_rows(context_tokens=longest, questions=questions, part=part, lengths=ruler, **every)
        yield from ((record, part) for record in made)


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


def _count(rows: int, held_out: float, part: str) -> int:
    held = round(rows * held_out)
    return held if part == "eval" else rows - held


def _add(
    pool: Pool,
    out: Any,
    batch: Sequence[tuple[dict[str, Any], str]],
    source: MixSource,
    recipe: Recipe,
    ledger: Ledger,
    lengths: Lengths,
) -> None:
    """Measure rows and put them into the pool; those too long go to the ledger."""
    rows: list[tuple[Row, dict[str, Any], str]] = []
    for record, part in batch:
        row = to_row(record, "text" if "text" in record else "messages", source=source.name, origin="")
        rows.append((row, record, part))
    for (row, record, part), tokens in zip(rows, _measured([row for row, *_ in rows], lengths), strict=True):
        origin = f"{source.name}:{record.get('id', len(pool) + 1)}"
        if isinstance(tokens, BadRow):
            ledger.add(Entry.of(origin, tokens))
            continue
        if tokens > recipe.max_length_tokens:
            detail = f"{tokens} tokens, the limit is {recipe.max_length_tokens}"
            ledger.add(Entry(origin, "too long", detail, "overlong"))
            continue
        pool.at.append(out.tell())
        out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        pool.source.append(source.name)
        pool.origin.append(origin)
        pool.language.append(row.language or "und")
        pool.tokens.append(tokens)
        pool.is_text.append(row.is_text)
        pool.gain.append(number_of(record, GAIN))
        pool.part.append(part)
        pool.anchors.append(anchors(row.turns) if recipe.held_out else np.zeros(0, dtype=np.uint64))
        if recipe.near_duplicates is not None:
            pool.signatures.append(signature(row.turns))


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
