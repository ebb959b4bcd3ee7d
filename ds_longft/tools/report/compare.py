"""Two or more runs on one page: what differs between them, how their losses went, what came of it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ds_longft.tools.pages.charts import Line, line_chart
from ds_longft.tools.pages.shell import facts_table, shell, words_table
from ds_longft.tools.report.run_facts import RunFacts, points
from ds_longft.tools.report.tables import overview, progress
from ds_longft.tools.report.verdict import cost, verdict

MOST_RUNS = 5  # a chart has five colours


def comparison_page(runs: Sequence[RunFacts]) -> str:
    """The whole page."""
    names = _names(runs)
    settings = _rows([dict(overview(run)) for run in runs])
    different = [row for row in settings if len(set(row[1:])) > 1]
    results = _rows([{**{what: after for what, _, after in verdict(run)}, **dict(progress(run))} for run in runs])
    costs = [["cost", *(cost(run) or "-" for run in runs)]]
    charts = "".join(
        line_chart(
            [
                Line(name, points(records(run), key), i)
                for i, (name, run) in enumerate(zip(names, runs, strict=True))
            ],
            name=title, x_label="optimizer step", y_label="per target token or pair",
        )
        for title, key, records in (
            ("Training loss", "loss", lambda run: run.steps), ("Held-out loss", "eval_loss", lambda run: run.held_out),
        )
    )  # fmt: skip
    told = words_table(["", *names], different, "Settings of each run") if different else "<p>No setting differs.</p>"
    sections = [
        ("Results", words_table(["", *names], [*results, *costs], "What came of each run")),
        ("Losses", f"<div class=pair>{charts}</div>" if charts else ""),
        ("What differs", told),
        ("What all share", facts_table([(row[0], row[1]) for row in settings if row not in different])),
    ]
    return shell(" and ".join(names), f"{len(runs)} runs compared", "good", sections)


def _names(runs: Sequence[RunFacts]) -> list[str]:
    """Folder names; where two are alike their paths below the folder that holds all of them."""
    short, paths = [run.folder.name for run in runs], [run.folder.absolute() for run in runs]
    if len(set(short)) == len(short) or len(set(paths)) < len(paths):
        return short
    above = os.path.commonpath(paths)
    return [str(path.relative_to(above)) for path in paths]


def _rows(of_runs: Sequence[dict[str, str]]) -> list[list[str]]:
    keys = dict.fromkeys(key for facts in of_runs for key in facts)
    return [[key, *(facts.get(key, "-") for facts in of_runs)] for key in keys]
