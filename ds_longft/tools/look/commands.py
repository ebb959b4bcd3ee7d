"""What `ds-longft data tokenize|stats|inspect` do. Each prints for people, or JSON for machines."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape as rich_escape
from rich.table import Table
from rich.text import Text

from ds_longft.command_line import RunKeys
from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import RunConfig
from ds_longft.data.pack_plan import plan_epoch
from ds_longft.data.progress import say_once
from ds_longft.data.stream import Stream
from ds_longft.data.tokenize import Input, tokenize_sources
from ds_longft.errors import ConfigError, DataError, ModelError
from ds_longft.model.hidden_torch import show_torch
from ds_longft.tools.look.cost import cost_of_run
from ds_longft.tools.look.statistics import GROUP_COLUMNS, Statistics, facts, kept_in_words, statistics

if TYPE_CHECKING:
    from ds_longft.data.tokenized import TokenizedRow, TokenizedSet, Weighting

WIDTH = 40  # characters of the longest bar of a histogram


def tokenize(config: RunKeys, *, json: bool = False) -> None:
    """Tokenize the training and evaluation sets of a run config, so that the run itself starts at once.

    Args:
        config: run config; its `data` section and `model.path` (for the tokenizer) are read.
        json: print one JSON object instead of a table.
    """
    run = _run(config)
    tokenizer = _tokenizer(run)
    parts = {
        part: _tokenized(run, sources, tokenizer)
        for part, sources in (("train", run.data.train), ("eval", run.data.eval))
        if sources
    }
    if not parts:
        raise ConfigError("data.train is empty: give at least one source, e.g. [{path: my.jsonl}]")
    counts = {part: rows.counts() for part, rows in parts.items()}
    if json:
        print(json_text.dumps(counts))
        return
    table = Table("", *counts)
    for name in next(iter(counts.values())):
        table.add_row(name.replace("_", " "), *(_shown(of[name]) for of in counts.values()))
    Console().print(table)


def stats(config: RunKeys, *, dp: int = 1, sp: int = 1, html: str | None = None, json: bool = False) -> None:
    """Show what a run config trains on: rows, lengths by source and language, targets, packs, padding, attention cost.

    Args:
        config: run config.
        dp: data-parallel ranks that share the packs of a step.
        sp: ranks that share one pack; packs are padded to a multiple of it.
        html: write all of it as one HTML file, pictures included.
        json: print one JSON object instead of tables.
    """
    if dp < 1 or sp < 1:
        raise ConfigError(f"--dp is {dp}, --sp is {sp}: expected 1 or more")
    run = _run(config)
    cost = cost_of_run(run)
    rows = _tokenized(run, run.data.train, _tokenizer(run))
    found = statistics(
        rows, run.data, dp=dp, sp=sp, accumulation=run.train.gradient_accumulation_steps, seed=run.seed,
        equal_cost_tokens=cost,
    )  # fmt: skip
    note = f"{run.output_dir}: dp {dp}, sp {sp}, weighting {run.data.weighting}"
    if html:
        write_page(found, html, title="Training data", note=note)
    if json:
        print(json_text.dumps(as_json(found, rows)))
        return
    show(found)
    if html:
        print(f"written: {html}")


def write_page(found: Statistics, path: str, *, title: str, note: str) -> None:
    """The HTML page; its folder is made."""
    from ds_longft.tools.look.html import page

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page(found, title=title, note=note), encoding="utf-8")


def as_json(found: Statistics, rows: TokenizedSet) -> dict[str, Any]:
    """The statistics for machines."""
    lengths = [
        {
            "up_to_tokens": bound,
            "rows": found.rows_by_length[i],
            "tokens": found.tokens_by_length[i],
            "by_source": {name: counts[i] for name, counts in found.by_source.items()},
            "by_language": {name: counts[i] for name, counts in found.by_language.items()},
        }
        for i, bound in enumerate(found.bounds)
    ]
    packs = asdict(found.packs)
    return {
        **rows.counts(),
        **{name: packs.pop(name) for name in ("packs", "filled", "padding_tokens", "imbalance")},
        "steps_per_epoch": packs.pop("steps"),
        "pack": packs,
        "sources": [asdict(group) for group in found.sources],
        "languages": [asdict(group) for group in found.languages],
        "lengths": lengths,
        "left_out": found.left_out,
        "first_left_out": found.first_left_out,
        "unused": found.unused,
        "retention": [asdict(window) for window in found.retention],
        **({"pairs": asdict(found.pairs)} if found.pairs else {}),
    }


def show(found: Statistics) -> None:
    """Tables for a terminal."""
    console = Console()
    table = Table(*GROUP_COLUMNS)
    for groups in (found.sources, found.languages, [found.total]):
        for group in groups:
            table.add_row(Text(group.name), *group.cells)
        table.add_section()
    console.print(table)
    bars = Table("tokens up to", "rows", *map(rich_escape, found.by_language), "")
    for bound, count, *of_language in zip(found.bounds, found.rows_by_length, *found.by_language.values(), strict=True):
        bar = "█" * round(WIDTH * count / max(found.rows_by_length))
        bars.add_row(f"{bound:,}", f"{count:,}", *(f"{n:,}" for n in of_language), bar)
    console.print(bars)
    table = Table("packing", found.packs.packing)
    left_out = [f"{count:,} {reason}{_first(found, reason)}" for reason, count in found.left_out.items()]
    unused = [f"{count:,} {what}" for what, count in found.unused.items()]
    for name, value in (
        *facts(found),
        ("left out", "\n".join(left_out) or "nothing"),
        ("in the rows, and not used", "\n".join(unused) or "nothing"),
    ):
        table.add_row(name, Text(value))
    console.print(table)
    if len(found.retention) > 1:
        kept = Table("data.max_length_tokens", kept_in_words(found), "targets in them")
        for window in found.retention:
            kept.add_row(f"{window.window_tokens:,}", f"{window.rows:.1%}", f"{window.targets:.1%}")
        console.print(kept)


def _first(found: Statistics, reason: str) -> str:
    """Where the first row stands that was left out for this reason; sets tokenized by older versions do not say."""
    return f", first {found.first_left_out[reason]}" if reason in found.first_left_out else ""


def inspect(
    config: RunKeys,
    *,
    row: int = 0,
    pack: int | None = None,
    epoch: int = 0,
    max_chars: int = 4000,
    json: bool = False,
) -> None:
    """Show one row, or one pack, as the model sees it: decoded from its tokens, with what is trained in colour.

    Args:
        config: run config.
        row: number of the row in the tokenized training set, from 0.
        pack: number of a pack in the epoch, from 0; all its documents are shown, with their borders.
        epoch: of which epoch, from 0; each has packs of its own.
        max_chars: longer stretches without targets are shown by their ends.
        json: print one JSON object instead.
    """
    if epoch < 0 or max_chars < 0:
        raise ConfigError(f"--epoch is {epoch}, --max_chars is {max_chars}: expected 0 or more")
    run = _run(config)
    tokenizer = _tokenizer(run)
    rows = _tokenized(run, run.data.train, tokenizer)
    numbers = [row]
    if pack is not None:
        plan = plan_epoch(
            rows.lengths, budget_tokens=run.budget_tokens, dp=1, seed=run.seed, epoch=epoch,
            accumulation=run.train.gradient_accumulation_steps, packing=run.data.packing,
        )  # fmt: skip
        if not 0 <= pack < len(plan.packs):
            raise DataError(f"pack {pack} does not exist: epoch {epoch} has packs 0 to {len(plan.packs) - 1}")
        numbers = plan.packs[pack].tolist()
    elif not 0 <= row < len(rows):
        raise DataError(f"row {row} does not exist: the set has rows 0 to {len(rows) - 1}")
    shown = [
        [part for one in rows.documents(number) for part in _parts(one, tokenizer, run.data.weighting)]
        for number in numbers
    ]
    heads: list[dict[str, Any]] = [
        {"row": one.index, "origin": one.origin, "tokens": int(rows.lengths[number]), "targets": one.targets}
        for number, one in zip(numbers, map(rows.row, numbers), strict=True)
    ]
    if json:
        documents = [
            {**fact, "parts": [{"text": text, "loss_weight": weight} for text, weight in parts if text]}
            for fact, parts in zip(heads, shown, strict=True)
        ]
        print(json_text.dumps(documents[0] if pack is None else {"pack": pack, "documents": documents}))
        return
    console = Console()
    shown_as = "(green)" if console.color_system else "(in [[ ]])"
    at = 0
    for fact, parts in zip(heads, shown, strict=True):
        if pack is not None:
            head = f"tokens {at:,} to {at + fact['tokens']:,}: row {fact['row']}, {fact['origin']}"
            console.rule(Text(head, style="bold cyan"), align="left")
        console.print(coloured(parts, max_chars, marked=not console.color_system), soft_wrap=True)
        at += fact["tokens"]
    targets = sum(fact["targets"] for fact in heads)
    if pack is None:
        line = f"{heads[0]['origin']}: {at:,} tokens, {targets:,} of them trained {shown_as}"
    else:
        used = f"{at:,} of {max(at, run.budget_tokens):,} tokens"  # a longer row has a pack of its length
        line = f"pack {pack}: {len(heads)} documents, {used}, {targets:,} trained {shown_as}"
    console.print(f"\n{line}", markup=False, soft_wrap=True)


def coloured(parts: Iterable[tuple[str, float]], max_chars: int, *, marked: bool = False) -> Text:
    """(text, weight) pieces in a row; those without weight are cut where they are longer than `max_chars`.

    `marked`: brackets too, where no colour is seen.
    """
    text = Text()
    for piece, weight in parts:
        if weight:
            text.append(f"[[{piece}]]" if marked else piece, style="bold green")
        elif len(piece) > max_chars:
            half = max_chars // 2
            text.append(piece[:half]).append(f" [... {len(piece) - 2 * half:,} characters ...] ", style="dim")
            text.append(piece[-half:] if half else "")
        else:
            text.append(piece)
    return text


def _parts(one: TokenizedRow, tokenizer: Any, weighting: Weighting) -> list[tuple[str, float]]:
    """(text, weight of its labels) of a document, piece by piece."""
    parts: list[tuple[str, float]] = []
    at = 0
    spans = zip(one.span_start.tolist(), one.span_end.tolist(), one.label_weights(weighting), strict=True)
    for start, end, weight in spans:
        parts.append((tokenizer.decode(one.input_ids[at:start]), 0.0))
        parts.append((tokenizer.decode(one.input_ids[start:end]), float(weight)))
        at = end
    return [*parts, (tokenizer.decode(one.input_ids[at:]), 0.0)]


def _run(config: RunKeys) -> RunConfig:
    from ds_longft.config.read import load_run_config

    run = load_run_config(config)
    if not run.model.path:
        raise ConfigError("model.path is empty: it names the tokenizer")
    return run


def _tokenizer(run: RunConfig) -> Any:
    from ds_longft.model import read_model

    if run.model.trust_remote_code:  # which may import torch
        show_torch()
    return read_model.load_tokenizer(run.model)


def _tokenized(run: RunConfig, sources: Sequence[SourceConfig], tokenizer: Any) -> TokenizedSet:
    if run.data.stream_window_mib is not None and sources is run.data.train:
        say_once("data.train is a stream: this is its first window")
        return Stream(Input.of(sources, tokenizer, run.data, progress=True, streaming=True), run.data).window(0)
    return tokenize_sources(sources, tokenizer, run.data, progress=True, pairs=run.pairs)


def load_tokenizer(path: str) -> Any:
    """A Hugging Face tokenizer by folder or hub id. Raises ModelError."""
    from transformers import AutoTokenizer  # seconds, and not needed for `--help`

    try:
        return AutoTokenizer.from_pretrained(Path(path).expanduser() if path.startswith("~") else path)
    except Exception as error:  # every tokenizer backend has its own way to fail on a missing or broken file
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"no tokenizer can be read from {path!r}: {why}") from error


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
