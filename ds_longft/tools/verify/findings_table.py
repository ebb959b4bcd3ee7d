"""What the user sees: which text is trained, and the table of findings."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_longft.batch import Pack
from ds_longft.exactness.finding import Finding
from ds_longft.exactness.packs import documents_of
from ds_longft.tools.look.colour import coloured

MAX_CHARS = 400  # of a stretch without targets
FILE_WIDTH = 180  # of the table where there is no terminal to ask


def trained_text(pack: Pack, tokenizer: Any) -> Text:
    """The first document of a pack that trains something, decoded; what the model learns to write is green."""
    documents = [d for d in documents_of(pack) if d[2].any()]
    if not documents:
        return Text()
    ids, _, weights = documents[0]
    trained = np.concatenate([[False], weights[:-1] != 0])  # a token is trained by the label of the one before it
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    return coloured(((tokenizer.decode(ids[a:b]), float(trained[a])) for a, b in pairwise(edges)), MAX_CHARS)


def print_report(findings: list[Finding], facts: dict[str, Any], sample: Text | None, *, as_json: bool) -> None:
    """One table, or one JSON object with the same content."""
    failed = [f for f in findings if f.ok is False]
    if as_json:
        names = {"tolerance": "allowed"}
        rows = [{names.get(key, key): value for key, value in asdict(f).items()} for f in findings]
        print(json.dumps({"ok": not failed, **facts, "findings": rows}), flush=True)
        return
    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(highlight=False, width=width)
    if sample:
        console.rule("one document as it is trained: the model learns to write what is green", align="left")
        console.print(sample, soft_wrap=True)
        console.rule()
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    table = Table("check", "what", "measured", "allowed", "", "cause or remark")
    before = ""
    for f in findings:
        verdict = Text("-", "dim") if f.ok is None else Text("ok", "green") if f.ok else Text("FAILED", "bold red")
        table.add_row(f.check if f.check != before else "", f.what, f.measured, f.tolerance, verdict, f.note)
        before = f.check
    console.print(table)
    judged = sum(f.ok is not None for f in findings)
    if failed:
        console.print(
            f"[bold red]{len(failed)} of {judged} findings failed[/]: this run would not train what it should."
        )
    else:
        console.print(f"[bold green]All {judged} findings passed.[/]")
