"""`ds-longft data score`: what long context gains a model on each row of a set, to choose rows by.

Two losses of each target: with all of the row before it, and with a short window of it. Where they differ, what stands
far away tells what comes; rows of which the model learns nothing by looking back teach it no looking back either.
"""

from __future__ import annotations

import json as json_text
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.formats import TOKEN_GAINS
from ds_longft.data.readers import read_rows
from ds_longft.data.rows import BadRow
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.evaluation import Result, Row, evaluate_on_ranks
from ds_longft.tools.evaluate.flags import RANKS, Flags, Ranks, print_tables, tokens_of
from ds_longft.tools.make_data.convert import written_whole

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

SCORES = ("context_gain", "loss_long", "loss_short", "tokens")
"""Columns that are added to a row."""


def score(
    model: str,
    rows: str,
    out: str,
    *,
    short: int | str = "4K",
    length: int | str | None = None,
    tokens: bool = False,
    base: str | None = None,
    json: bool = False,
    flags: Ranks = RANKS,
) -> None:
    """Write the rows of a set with what long context gains on them, the most first.

    Columns: `loss_long`, the mean loss (nats) of the row's targets with all of it before them; `loss_short`, with a
    quarter of --short to all of it before them; `context_gain`, the second less the first; `tokens`. `data mix` takes
    rows by them (`least: {context_gain: 0.02}` of a source, `choose: context_gain` of a recipe). Stopped and started
    again with the same settings, it goes on.

    Args:
        model: what reads the rows: output folder of a run, adapter, model folder or hub id.
        rows: a JSON, JSONL or parquet file, a folder of them, or a hub id; any layout that is trained on.
        out: JSONL file to write.
        short: tokens of the short window.
        length: longest row; longer ones are left out. Left out: the model's window.
        tokens: also write `token_gains`, the gain on each target in tenths of a nat, for `data.weighting: gain`.
        base: the base model of an adapter, where it has moved.
        json: print one JSON object instead of a table.
    """
    arguments = dict(locals())
    window = tokens_of("--short", short)
    if window < 8:
        raise ConfigError(f"--short is {short}: expected 8 or more tokens, e.g. 4K")
    longest = None if length is None else tokens_of("--length", length)

    def measure(answering: Answering) -> Result:
        return _measure(answering, rows, Path(out), window, longest, tokens)

    asked = Flags(**asdict(flags), base=base, out=f"{out}.scores", json=json)
    evaluate_on_ranks("data score", arguments, measure, _show, asked)


def _measure(answering: Answering, path: str, out: Path, window: int, length: int | None, tokens: bool) -> Result:
    processes, source = answering.processes, SourceConfig(path=path)
    longest = length or answering.window or 8192
    data = DataConfig(max_length_tokens=longest, max_bad_fraction=1)
    writes = processes.launch.rank == 0
    rows = processes.one_first(lambda: tokenize_sources([source], answering.tokenizer, data, progress=writes))
    of_origin = {origin: i for i, origin in enumerate(rows.column("origin").tolist())}

    def scored(origin: str) -> list[Row]:
        row = rows.row(of_origin[origin])
        ids = row.input_ids.tolist()
        targets = np.zeros(len(ids), dtype=bool)
        for start, end in zip(row.span_start.tolist(), row.span_end.tolist(), strict=True):
            targets[max(1, start) : end] = True
        with_all = answering.losses(ids)
        with_short = answering.losses(ids, window) if len(ids) > window else with_all
        far, near = float(with_all[targets].mean()), float(with_short[targets].mean())
        each = {"token_gains": (np.round((with_short - with_all)[targets], 1) + 0.0).tolist()} if tokens else {}
        return [
            {"key": origin, "context_gain": round(near - far, 5), "loss_long": round(far, 5),
             "loss_short": round(near, 5), "tokens": len(ids), **each}
        ]  # fmt: skip

    settings = {"rows": rows.content, "short_tokens": window, "length_tokens": longest, "each_token": tokens}
    todo = answering.open_rows("score", settings, list(of_origin))
    answering.expect(max((int(rows.lengths[of_origin[origin]]) for origin in todo), default=1))
    # Rows of one length at a time: the GPUs of a round wait for its longest.
    answering.add(sorted(todo, key=lambda origin: int(rows.lengths[of_origin[origin]])), scored)

    def summary(made: list[Row]) -> dict[str, Any]:
        made.sort(key=lambda row: -row["context_gain"])
        left_out = _write(out, source, {row["key"]: row for row in made})
        gains = [row["context_gain"] for row in made]
        shares = {str(p): round(float(np.percentile(gains, p)), 5) for p in (5, 25, 50, 75, 95)}
        return {"out": str(out), "rows": len(made), "left_out": left_out, "gain_percentiles": shares}

    return answering.finish("score", summary)


def _write(out: Path, source: SourceConfig, scores: dict[str, dict[str, Any]]) -> int:
    """The records as they were, with their scores, in the order of `scores`; returns how many have none.

    Memory: the places of the records in a file beside `out`, not the records.
    """
    spool, places, left_out = out.with_name(f".{out.name}.unsorted"), dict[str, int](), 0
    with spool.open("wb") as file:
        for origin, record in read_rows(source):
            if origin not in scores or isinstance(record, BadRow):
                left_out += 1
                continue
            places[origin] = file.tell()
            whole = record | {name: scores[origin][name] for name in (*SCORES, TOKEN_GAINS) if name in scores[origin]}
            file.write(json_text.dumps(whole, ensure_ascii=False, default=str).encode() + b"\n")
    with written_whole(out) as sorted_file, spool.open("rb") as file:
        for origin in scores:
            file.seek(places[origin])
            sorted_file.write(file.readline().decode())
    spool.unlink()
    return left_out


def _show(result: dict[str, Any], path: Path) -> None:
    settings = result["settings"]
    table = Table("rows, the most gained first", "context gain, nats per token")
    for percent in ("95", "75", "50", "25", "5"):
        gain = result["gain_percentiles"][percent]
        table.add_row(f"best {100 - int(percent)} %", f"{gain:.4f} or more (x {math.exp(gain):.2f})")
    print_tables(
        f"{result['out']}: {result['rows']:,} rows, {settings['length_tokens']:,} tokens against "
        f"{settings['short_tokens']:,}; {result['left_out']:,} left out (unusable or longer); {path}",
        table,
    )
