"""A recipe -> train.jsonl and eval.jsonl: rows of many sources in the wanted shares, each text in one of the two."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_longft.data.ledger import Entry, Ledger
from ds_longft.errors import DataError
from ds_longft.tools.make_data.convert import written_whole
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.pool import PooledRow, fill_pool
from ds_longft.tools.make_data.quota import Margin, partition, quotas
from ds_longft.tools.make_data.recipe import Recipe
from ds_longft.tools.make_data.similar import groups_sharing_text, near_duplicates

Rows = list[PooledRow]

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
            if not pool:
                raise DataError(f"no source has a usable row of at most {recipe.max_length_tokens} tokens")
            usable = _without_duplicates(pool, recipe, ledger)
            train, held_out = _split(_choose(usable, recipe), recipe, ledger)
            tally = ledger.tally
        rng = np.random.default_rng([recipe.seed, 1])
        for name, rows in (("train", train), ("eval", held_out)):
            path = folder / f"{name}.jsonl"
            path.unlink(missing_ok=True)
            if rows:
                order = [rows[i] for i in rng.permutation(len(rows))]
                # A chat in front: the first row tells a file's layout, and among chats there may be plain texts.
                first = next((row for row in order if not row.is_text), order[0])
                with written_whole(path) as file, spool.open("rb") as lines:
                    for row in [first, *(row for row in order if row is not first)]:
                        lines.seek(row.at)
                        file.write(lines.readline().decode())
    finally:
        spool.unlink(missing_ok=True)
    mixed = Mixed(
        train=str(folder / "train.jsonl"),
        eval=str(folder / "eval.jsonl") if held_out else None,
        ledger=str(folder / "ledger.jsonl"),
        train_rows=len(train),
        eval_rows=len(held_out),
        tokens=sum(row.tokens for row in [*train, *held_out]),
        exact_lengths=lengths.exact,
        left_out=tally.left_out,
        first_left_out=tally.first,
        kinds=_kinds(pool, train, held_out, recipe),
    )
    (folder / "mix.json").write_text(
        json.dumps({**asdict(mixed), "recipe": recipe.model_dump(mode="json")}, indent=1, ensure_ascii=False)
    )
    return mixed


def _without_duplicates(pool: Rows, recipe: Recipe, ledger: Ledger) -> Rows:
    """Rows of the pool that are the first of their kind."""
    if recipe.near_duplicates is None:
        return pool
    same = near_duplicates([row.signature for row in pool], recipe.near_duplicates)
    for row, earlier in same.items():
        reason = "nearly the same as an earlier row"
        ledger.add(Entry(pool[row].origin, reason, pool[earlier].origin, "set_aside"))
    return [row for i, row in enumerate(pool) if i not in same]


def _band(tokens: int, recipe: Recipe) -> str:
    """The band of a length, by its upper bound."""
    return next((str(b.up_to_tokens) for b in recipe.lengths if tokens <= b.up_to_tokens), "")


def _choose(usable: Rows, recipe: Recipe) -> Rows:
    """Rows of the mix: as many of each cell of source, language and band as `quotas` says, as `choose` says."""
    kinds = [(row.source, row.language, _band(row.tokens, recipe)) for row in usable]
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

    chosen: list[int] = []
    for cell, count in enumerate(take.tolist()):
        places = np.flatnonzero(cell_of == cell)
        if recipe.choose == "evenly":
            places = rng.choice(places, count, replace=False) if count else places[:0]
        else:
            places = places[np.argsort([-usable[i].gain for i in places], kind="stable")[:count]]
        chosen += places.tolist()
    return [usable[i] for i in sorted(chosen)]


def _split(chosen: Rows, recipe: Recipe, ledger: Ledger) -> tuple[Rows, Rows]:
    """(training rows, held-out rows): rows that share a passage stay on one side.

    Made rows know their side already. A held-out one that shares text with a training row all the same (the text came
    in by another source, too) is left out.
    """
    if not recipe.held_out:
        return chosen, []
    common = max(COMMON_ROWS, len(chosen) // 100)
    group = groups_sharing_text([row.anchors for row in chosen], common)
    members: dict[int, list[int]] = {}
    for i, number in enumerate(group.tolist()):
        members.setdefault(number, []).append(i)
    held: list[int] = []
    train: list[int] = []
    free: list[list[int]] = []
    for rows in members.values():
        parts = {chosen[i].part for i in rows} - {""}
        if not parts:
            free.append(rows)
        elif parts == {"eval"}:
            held += rows
        else:
            reason, detail = "shares text with a training row", "it was to be held out"
            for i in rows:
                if chosen[i].part == "eval":
                    ledger.add(Entry(chosen[i].origin, reason, detail, "set_aside"))
                else:
                    train.append(i)
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
    return [chosen[i] for i in sorted(train)], [chosen[i] for i in sorted(held)]


def _kinds(pool: Rows, train: Rows, held_out: Rows, recipe: Recipe) -> list[dict[str, Any]]:
    """Property, value, rows in the pool, share wanted, rows and share in the mix."""
    properties: list[tuple[str, Mapping[str, float | None], Callable[[PooledRow], str]]] = [
        ("source", {s.name: s.share for s in recipe.sources}, lambda row: row.source),
        ("language", dict(recipe.languages), lambda row: row.language),
        ("tokens up to", {str(b.up_to_tokens): b.share for b in recipe.lengths}, lambda row: _band(row.tokens, recipe)),
    ]
    kinds = []
    for name, wanted, of in properties:
        there, held = Counter(map(of, pool)), Counter(map(of, held_out))
        taken = held + Counter(map(of, train))
        for value in dict.fromkeys(value for value in [*wanted, *sorted(there)] if value):
            kinds.append(
                {"of": name, "is": value, "pool": there[value], "wanted": wanted.get(value), "rows": taken[value],
                 "held_out": held[value], "share": taken[value] / (len(train) + len(held_out))}
            )  # fmt: skip
    return kinds
