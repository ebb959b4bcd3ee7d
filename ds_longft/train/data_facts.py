"""`data.json` of a run: what it trains on, in numbers, and one row to look at. For the report and the model card."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ds_longft.data.tokenized import TokenizedSet

DATA_FACTS = "data.json"
SAMPLE_CHARACTERS = 600  # of the prompt's end and of the answer
SAMPLE_TOKENS = 400
BROKEN = "\ufffd"  # a character whose first or last token was cut off
LEFT_OUT = ("bad_rows", "overlong_rows_dropped", "truncated_rows")  # of all rows read


def write_data_facts(
    folder: Path,
    train: TokenizedSet,
    held_out: TokenizedSet | None,
    tokenizer: Any,
    total_steps: int,
    window: int | None = None,
) -> None:
    """Write the statistics of both sets and the number of steps into the run's folder. `window`: of a stream."""
    parts = {"train" if window is None else f"train, window {window} of a stream": train} | (
        {"held out": held_out} if held_out is not None else {}
    )
    told = {name: statistics(part) for name, part in parts.items()}
    if held_out is not None and held_out.tally is train.tally:  # a part of one source: it was counted before the split
        told["held out"] = {key: value for key, value in told["held out"].items() if key not in LEFT_OUT}
    facts = {"total_steps": total_steps, "parts": told, "sample": sample(train, tokenizer)}
    (folder / DATA_FACTS).write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def statistics(rows: TokenizedSet) -> dict[str, Any]:
    """Rows, tokens, targets, lengths in doubling buckets, sources, languages, and what was left out."""
    exponents = np.ceil(np.log2(np.maximum(rows.lengths, 1))).astype(int)
    return rows.counts() | {
        "median_tokens": int(np.median(rows.lengths)),
        "rows_up_to_tokens": {
            str(1 << e): int((exponents == e).sum()) for e in range(exponents.min(), exponents.max() + 1)
        },
        "sources": dict(Counter(map(str, rows.column("source")))),
        "languages": dict(Counter(str(name) for name in rows.column("language") if name is not None)),
    }


def sample(rows: TokenizedSet, tokenizer: Any) -> dict[str, Any] | None:
    """The first row's first trained stretch, and the end of what stands before it."""
    row = rows.row(0)
    if not len(row.span_start):
        return None
    start, end = int(row.span_start[0]), int(row.span_end[0])
    before = tokenizer.decode(row.input_ids[max(0, start - SAMPLE_TOKENS) : start])
    trained = tokenizer.decode(row.input_ids[start : min(end, start + SAMPLE_TOKENS)])
    if start > SAMPLE_TOKENS or len(before) > SAMPLE_CHARACTERS:
        before = f"… {before[-SAMPLE_CHARACTERS:].lstrip(BROKEN)}"
    if end - start > SAMPLE_TOKENS or len(trained) > SAMPLE_CHARACTERS:
        trained = f"{trained[:SAMPLE_CHARACTERS].rstrip(BROKEN)} …"
    return {"origin": row.origin, "tokens": len(row.input_ids), "before": before, "trained": trained}
