"""What `ds-longft data tokenize|stats|inspect|synth-code` do. Each prints for people, or JSON for machines."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_longft.config import RunConfig, parse_tokens
from ds_longft.data.loader import StepLoader
from ds_longft.data.synth.code import Part, write_code_set
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from ds_longft.data.tokenized import TokenizedSet

WIDTH = 40  # characters of the longest bar of a histogram


def tokenize(config: str, json: bool = False) -> None:
    """Tokenize the training and evaluation sets of a run config, so that the run itself starts at once.

    Args:
        config: YAML run config; its `data` section and `model.path` (for the tokenizer) are read.
        json: print one JSON object instead of a table.
    """
    run, tokenizer = _read(config)
    parts = {
        part: tokenize_sources(sources, tokenizer, run.data, progress=True)
        for part, sources in (("train", run.data.train), ("eval", run.data.eval))
        if sources
    }
    if not parts:
        raise ConfigError(f"data.train is empty in {config}: give at least one source, e.g. [{{path: my.jsonl}}]")
    facts = {part: _counts(rows) for part, rows in parts.items()}
    if json:
        print(json_text.dumps(facts))
        return
    table = Table("", *facts)
    for name in next(iter(facts.values())):
        table.add_row(name.replace("_", " "), *(_shown(fact[name]) for fact in facts.values()))
    Console().print(table)


def stats(config: str, dp: int = 1, sp: int = 1, json: bool = False) -> None:
    """Show what a run config trains on: rows, tokens, lengths, share of targets, packs and padding.

    Args:
        config: YAML run config.
        dp: data-parallel ranks that share the packs of a step.
        sp: ranks that share one pack; packs are padded to a multiple of it.
        json: print one JSON object instead of tables.
    """
    run, tokenizer = _read(config)
    rows = tokenize_sources(run.data.train, tokenizer, run.data, progress=True)
    loader = StepLoader(
        rows,
        data=run.data,
        dp=dp,
        dp_rank=0,
        sp=sp,
        accumulation=run.train.gradient_accumulation_steps,
        seed=run.seed,
        pad_id=0,
    )
    plan = loader.plan(0)
    padding = int((-plan.pack_tokens % sp).sum())
    histogram = _histogram(rows.lengths)
    facts = {
        **_counts(rows),
        "packs": len(plan.packs),
        "steps_per_epoch": len(plan),
        "padding_tokens": padding,
        "filled": float(plan.pack_tokens.sum() / (len(plan.packs) * run.data.budget_tokens)),
        "lengths": [{"up_to_tokens": up_to, "rows": count} for up_to, count in histogram],
    }
    if json:
        print(json_text.dumps(facts))
        return
    console = Console()
    table = Table("", "train")
    for name, value in facts.items():
        if name != "lengths":
            table.add_row(name.replace("_", " "), _shown(value))
    console.print(table)
    most = max(count for _, count in histogram)
    bars = Table("tokens up to", "rows", "")
    for up_to, count in histogram:
        bars.add_row(f"{up_to:,}", f"{count:,}", "█" * round(WIDTH * count / most))
    console.print(bars)


def inspect(config: str, row: int = 0, max_chars: int = 4000, json: bool = False) -> None:
    """Show one row as the model sees it: decoded from its tokens, with what is trained in colour.

    Args:
        config: YAML run config.
        row: number of the row in the tokenized training set, from 0.
        max_chars: longer stretches without targets are shown by their ends.
        json: print one JSON object instead.
    """
    run, tokenizer = _read(config)
    rows = tokenize_sources(run.data.train, tokenizer, run.data, progress=True)
    if not 0 <= row < len(rows):
        raise DataError(f"row {row} does not exist: the set has rows 0 to {len(rows) - 1}")
    one = rows.row(row)
    parts: list[tuple[str, float]] = []  # text, weight of its labels
    at = 0
    spans = zip(one.span_start.tolist(), one.span_end.tolist(), one.label_weights(run.data.weighting), strict=True)
    for start, end, weight in spans:
        parts.append((tokenizer.decode(one.input_ids[at:start]), 0.0))
        parts.append((tokenizer.decode(one.input_ids[start:end]), float(weight)))
        at = end
    parts.append((tokenizer.decode(one.input_ids[at:]), 0.0))
    if json:
        facts = {"origin": one.origin, "tokens": len(one.input_ids), "targets": one.targets}
        shown = [{"text": text, "loss_weight": weight} for text, weight in parts if text]
        print(json_text.dumps({**facts, "parts": shown}))
        return
    text = Text()
    for piece, weight in parts:
        if weight:
            text.append(piece, style="bold green")
        elif len(piece) > max_chars:
            cut = max_chars // 2
            text.append(piece[:cut]).append(f" [... {len(piece) - 2 * cut:,} characters ...] ", style="dim")
            text.append(piece[-cut:])
        else:
            text.append(piece)
    console = Console()
    console.print(text)
    facts_line = f"{one.origin}: {len(one.input_ids):,} tokens, {one.targets:,} of them trained (green)"
    console.print(f"\n{facts_line}", markup=False)


def synth_code(
    path: str,
    *,
    rows: int = 200,
    context_tokens: int | str = "4K",
    questions: int = 1,
    seed: int = 0,
    part: Part = "train",
    tokenizer: str | None = None,
    json: bool = False,
) -> None:
    """Write a long-code set made of the Python standard library's source on this machine.

    Args:
        path: JSONL file to write, in `messages` form.
        rows: how many.
        context_tokens: longest row, e.g. 4096 or 128K.
        questions: how many are asked of one context, one after the other.
        seed: the same seed gives the same rows on the same Python.
        part: train or eval; the two never share a module.
        tokenizer: folder or hub id of a model, to fill the length exactly. Left out: lengths are estimated.
        json: print one JSON object instead of a line.
    """
    tokens = parse_tokens(context_tokens)
    if not isinstance(tokens, int) or tokens <= 0:
        raise ConfigError(f"--context_tokens is {context_tokens!r}: expected a number of tokens, e.g. 4096 or 128K")
    if questions < 1:
        raise ConfigError(f"--questions is {questions}: expected 1 or more")
    if part not in ("train", "eval"):
        raise ConfigError(f"--part is {part!r}: expected train or eval")
    loaded = _tokenizer(tokenizer) if tokenizer else None
    done = write_code_set(
        path, rows=rows, context_tokens=tokens, questions=questions, seed=seed, part=part, tokenizer=loaded
    )
    if json:
        print(json_text.dumps(asdict(done)))
        return
    about = "" if tokenizer else " (estimated)"
    print(f"{done.path}: {done.rows} rows of {done.shortest_tokens:,} to {done.longest_tokens:,} tokens{about}")


def _read(config: str) -> tuple[RunConfig, Any]:
    """The run config and its model's tokenizer."""
    from ds_longft.settings import load_config

    run = load_config(["--config", config])
    if not run.model.path:
        raise ConfigError(f"model.path is empty in {config}: it names the tokenizer")
    kwargs = {"revision": run.model.revision, "trust_remote_code": run.model.trust_remote_code}
    return run, _tokenizer(run.model.path, **kwargs)


def _tokenizer(path: str, **kwargs: Any) -> Any:
    from transformers import AutoTokenizer  # seconds, and not needed for `--help`

    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except Exception as error:  # every tokenizer backend has its own way to fail on a missing or broken file
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"no tokenizer can be read from {path!r}: {why}") from error


def _counts(rows: TokenizedSet) -> dict[str, Any]:
    tokens, tally = int(rows.lengths.sum()), rows.tally
    return {
        "rows": len(rows),
        "tokens": tokens,
        "longest_tokens": int(rows.lengths.max()),
        "targets": int(rows.targets.sum()),
        "target_share": float(rows.targets.sum() / tokens),
        "bad_rows": tally.bad_rows,
        "overlong_rows_dropped": tally.overlong,
        "truncated_rows": tally.truncated,
        "fingerprint": rows.fingerprint,
    }


def _histogram(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> list[tuple[int, int]]:
    """(upper bound, rows) in buckets that double."""
    exponents = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    return [(1 << e, int((exponents == e).sum())) for e in range(exponents.min(), exponents.max() + 1)]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else str(value)
