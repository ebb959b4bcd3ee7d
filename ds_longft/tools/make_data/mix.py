"""A recipe -> train.jsonl and eval.jsonl: rows of many sources in the wanted shares, each text in one of the two."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds_longft.data.ledger import Entry, Ledger
from ds_longft.errors import DataError
from ds_longft.tools.make_data.convert import written_whole
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.pool import Pool, fill_pool
from ds_longft.tools.make_data.quota import Margin, partition, quotas
from ds_longft.tools.make_data.recipe import Recipe
from ds_longft.tools.make_data.similar import groups_sharing_text, near_duplicates

COMMON_ROWS = 50  # a passage in more rows than this, and in more than a hundredth of them, is an instruction


@dataclass(frozen=True)
class Mixed:
    """What was written. Counts are rows."""

    train: str
    eval: str | None
    ledger: str
    train_rows: int
    eval_rows: int
    tokens: int
    exact_lengths: bool
    left_out: dict[str, int]  # reason -> rows, over the whole pool
    first_left_out: dict[str, str]  # reason -> the first of these rows, and what was seen in it
    kinds: list[dict[str, Any]]  # property, value, rows in the pool, share wanted, rows and share in the mix


def mix_sources(
    recipe: Recipe, folder: Path, *, tokenizer: Any = None, root: Path | None = None, progress: bool = False
) -> Mixed:
    """Write train.jsonl, eval.jsonl, ledger.jsonl and mix.json into `folder`.

    Memory grows by some kilobytes a row (what tells rows apart); the rows themselves wait on disk.

    Raises:
        DataError: a source cannot be used, or the shares cannot be met.
        LongftError: a library of the extra `synth` is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = Lengths(tokenizer)
    spool = folder / ".pool.jsonl"
    try:
        with Ledger(folder / "ledger.jsonl") as ledger:
            pool = fill_pool(recipe, spool, ledger, lengths, root=root, progress=progress)
            if not pool.rows:
                raise DataError(f"no source has a usable row of at most {recipe.max_length_tokens} tokens")
            usable = _without_duplicates(pool, recipe, ledger)
            chosen = _choose(pool, usable, recipe)
            train, held_out = _split(pool, chosen, recipe, ledger)
            tally = ledger.tally
        rng = np.random.default_rng([recipe.seed, 1])
        for name, rows in (("train", train), ("eval", held_out)):
            path = folder / f"{name}.jsonl"
            path.unlink(missing_ok=True)
            if len(rows):
                with written_whole(path) as file:
                    file.writelines(pool.records(_chat_first(rng.permutation(rows).tolist(), pool)))
    finally:
        spool.unlink(missing_ok=True)
    taken = [*train.tolist(), *held_out.tolist()]
    mixed = Mixed(
        train=str(folder / "train.jsonl"),
        eval=str(folder / "eval.jsonl") if len(held_out) else None,
        ledger=str(folder / "ledger.jsonl"),
        train_rows=len(train),
        eval_rows=len(held_out),
        tokens=sum(pool.rows[row].tokens for row in taken),
        exact_lengths=lengths.exact,
        left_out=tally.left_out,
        first_left_out=tally.first,
        kinds=_kinds(pool, taken, set(held_out.tolist()), recipe),
    )
    (folder / "mix.json").write_text(
        json.dumps({**asdict(mixed), "recipe": recipe.model_dump(mode="json")}, indent=1, ensure_ascii=False)
    )
    return mixed


def _chat_first(order: list[int], pool: Pool) -> list[int]:
    """The rows with a chat in front: the first row tells a file's layout, and among chats there may be plain texts."""
    at = next((i for i, row in enumerate(order) if not pool.rows[row].is_text), 0)
    return [order[at], *order[:at], *order[at + 1 :]]


def _without_duplicates(pool: Pool, recipe: Recipe, ledger: Ledger) -> NDArray[np.int64]:
    """Rows of the pool that are the first of their kind."""
    if recipe.near_duplicates is None:
        return np.arange(len(pool.rows))
    same = near_duplicates([row.signature for row in pool.rows], recipe.near_duplicates)
    for row, earlier in same.items():
        origin, other = pool.rows[row].origin, pool.rows[earlier].origin
        ledger.add(Entry(origin, "nearly the same as an earlier row", other, "set_aside"))
    return np.asarray([row for row in range(len(pool.rows)) if row not in same], dtype=np.int64)


def _band(tokens: int, recipe: Recipe) -> str:
    """The band of a length, by its upper bound."""
    return next((str(b.up_to_tokens) for b in recipe.lengths if tokens <= b.up_to_tokens), "")


def _choose(pool: Pool, usable: NDArray[np.int64], recipe: Recipe) -> NDArray[np.int64]:
    """Rows of the mix: as many of each cell of source, language and band as `quotas` says, as `choose` says."""
    kinds = [(row.source, row.language, _band(row.tokens, recipe)) for row in map(pool.rows.__getitem__, usable)]
    cells = sorted(set(kinds))
    number = {cell: i for i, cell in enumerate(cells)}
    cell_of = np.asarray([number[kind] for kind in kinds])
    margins = [
        Margin(f"source {s.name}", np.asarray([cell[0] == s.name for cell in cells]), most=s.rows)
        for s in recipe.sources
        if s.rows is not None
    ]
    shares = {s.name: s.share for s in recipe.sources if s.share is not None}
    margins += partition("sources", [cell[0] for cell in cells], shares)
    margins += partition("languages", [cell[1] for cell in cells], recipe.languages)
    bands = {str(band.up_to_tokens): band.share for band in recipe.lengths if band.share is not None}
    margins += partition("lengths", [cell[2] for cell in cells], bands)
    take = quotas(np.bincount(cell_of, minlength=len(cells)), margins, recipe.total_rows)
    rng = np.random.default_rng([recipe.seed, 0])

    def of_cell(cell: int, count: int) -> NDArray[np.int64]:
        rows = usable[cell_of == cell]
        if recipe.choose == "evenly":
            return rng.choice(rows, count, replace=False)
        gains = np.asarray([pool.rows[row].gain for row in rows])
        return rows[np.argsort(-gains, kind="stable")[:count]]

    return np.sort(np.concatenate([of_cell(cell, count) for cell, count in enumerate(take.tolist()) if count]))


def _split(
    pool: Pool, chosen: NDArray[np.int64], recipe: Recipe, ledger: Ledger
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, held-out rows): rows that share a passage stay on one side.

    Made rows know their side already. A held-out one that shares text with a training row all the same (the text came
    in by another source, too) is left out.
    """
    if not recipe.held_out:
        return chosen, chosen[:0]
    common = max(COMMON_ROWS, len(chosen) // 100)
    group = groups_sharing_text([pool.rows[row].anchors for row in chosen], common)
    members: dict[int, list[int]] = {}
    for row, number in zip(chosen.tolist(), group.tolist(), strict=True):
        members.setdefault(number, []).append(row)
    held: list[int] = []
    train: list[int] = []
    free: list[list[int]] = []
    for rows in members.values():
        parts = {pool.rows[row].part for row in rows} - {""}
        if not parts:
            free.append(rows)
        elif parts == {"eval"}:
            held += rows
        else:
            reason, detail = "shares text with a training row", "it was to be held out"
            for row in rows:
                if pool.rows[row].part == "eval":
                    ledger.add(Entry(pool.rows[row].origin, reason, detail, "set_aside"))
                else:
                    train.append(row)
    room = round(recipe.held_out * len(chosen)) - len(held)
    for number in np.random.default_rng([recipe.seed, 2]).permutation(len(free)).tolist():
        rows = free[number]
        if len(rows) <= room:
            held += rows
            room -= len(rows)
        else:
            train += rows
    if not train:
        raise DataError("held_out leaves no training row: every row shares text with a held-out one; lower held_out")
    return np.sort(np.asarray(train, dtype=np.int64)), np.sort(np.asarray(held, dtype=np.int64))


def _kinds(pool: Pool, mixed: Sequence[int], held_out: set[int], recipe: Recipe) -> list[dict[str, Any]]:
    """Property, value, rows in the pool, share wanted, rows and share in the mix."""
    kinds = []
    for name, wanted, of_row in (
        ("source", {s.name: s.share for s in recipe.sources}, [row.source for row in pool.rows]),
        ("language", recipe.languages, [row.language for row in pool.rows]),
        (
            "tokens up to",
            {str(band.up_to_tokens): band.share for band in recipe.lengths},
            [_band(row.tokens, recipe) for row in pool.rows],
        ),
    ):
        there, taken = Counter(of_row), Counter(of_row[row] for row in mixed)
        held = Counter(of_row[row] for row in held_out)
        for value in dict.fromkeys(value for value in [*wanted, *sorted(there)] if value):
            rows = taken[value]
            kinds.append(
                {"of": name, "is": value, "pool": there[value], "wanted": wanted.get(value), "rows": rows,
                 "held_out": held[value], "share": rows / len(mixed)}
            )  # fmt: skip
    return kinds
