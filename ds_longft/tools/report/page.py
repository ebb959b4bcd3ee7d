"""The page of a run, or of several beside each other: one HTML file. No network, no fonts, no pictures beside it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from typing import Any

from ds_longft.tools.pages.charts import MAX_POINTS, Line, bar_chart, heat_table, line_chart
from ds_longft.tools.pages.shell import commands, details, facts_table, shell, table, tiles, wide, words_table
from ds_longft.tools.report.run_facts import TITLES, Evaluation, RunFacts, points
from ds_longft.tools.report.tables import (
    data_line,
    data_rows,
    differences_line,
    evaluation_rows,
    overview,
    progress,
    reproduce,
    settings_line,
)
from ds_longft.tools.report.verdict import cost, duration, verdict
from ds_longft.train.smooth import FEWEST, running_mean, steps_of_a_mean

HUB = "https://huggingface.co/"
ON_A_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # owner/name, or a folder: then the link leads nowhere

MOST_RUNS = 5  # a chart has five colours


def html_page(facts: RunFacts) -> str:
    """The whole page of a run, finished or not."""
    sections = [
        ("Result", _result(facts)),
        ("Run", _run(facts)),
        ("Training", _training(facts)),
        ("Data", _data(facts)),
        *((e.title, _evaluation(e)) for e in _in_order(facts.evaluations)),
        ("Samples", _samples(facts)),
        ("Reproduce", _again(facts)),
    ]
    good = "good" if facts.status.startswith(("done", "running", "stopped and saved")) else "bad"
    error = f"<pre>{escape(facts.error)}</pre>" if facts.error else ""
    error += "".join(f"<p class=bad>{escape(problem)}</p>" for problem in facts.unreadable)
    return shell(facts.folder.name, facts.status, good, sections, error=error, refresh=facts.running)


def _result(facts: RunFacts) -> str:
    """What a reader wants first: before and after, the cost, the command."""
    rows = [list(row) for row in verdict(facts)]
    losses = [(e, label, r) for e in facts.evaluations if e.kind == "perplexity" for label, r in e.pair]
    curves = [Line(f"{label}{_of(e, r)}", _curve(r), i) for i, (e, label, r) in enumerate(losses)]
    chart = line_chart(curves, name="Loss by position", x_label="position, tokens", y_label="nats per token")
    grids = "".join(wide(grid, name) for name, grid in _grids(facts))
    told = [("data", data_line(facts)), ("cost", cost(facts)), ("time", duration(facts))]
    again = ["ds-longft", "train", f"{facts.folder}/config.yaml", "--output_dir", f"{facts.folder}-again"]
    shown = words_table(["", "before", "after"], rows, "Before and after; 95 % intervals in brackets") if rows else ""
    pictures = f"<div class=pair>{chart}<div class=heats>{grids}</div></div>" if chart and grids else chart + grids
    return (
        f"<p>From {_linked(facts.config.model.path)}</p>{shown}{pictures}"
        f"{facts_table([pair for pair in told if pair[1]])}{commands([shlex.join(again)])}"
    )


def _linked(model: str) -> str:
    """A model's name, with a link where it may be one of the hub."""
    return f'<a href="{HUB}{model}">{model}</a>' if ON_A_HUB.fullmatch(model) else escape(model)


def _grids(facts: RunFacts) -> Iterable[tuple[str, str]]:
    """(name, grid) of what is found at which length: of the needles of one language, or of RULER's tasks on average."""
    for evaluation in (e for e in facts.evaluations if e.name == e.kind == "needle"):
        result = evaluation.pair[-1][1]
        for language in list(result["grid"])[:1]:
            yield from _heat(evaluation.pair, language)
        return
    for evaluation in (e for e in facts.evaluations if e.name == e.kind == "ruler"):
        lengths = sorted({size for _, r in evaluation.pair for size in r["averages"]}, key=int)
        rows = [(label, [r["averages"].get(size) for size in lengths]) for label, r in evaluation.pair]
        name = "RULER, mean of the tasks, %"
        yield name, heat_table([_tokens(int(size)) for size in lengths], rows, name=name, corner="tokens")


def _tokens(number: int) -> str:
    return f"{number // 1024}K" if number % 1024 == 0 else str(number)


def _of(evaluation: Evaluation, result: dict[str, Any]) -> str:
    """What tells this curve from those of other evaluations."""
    window = result["settings"].get("window_tokens")
    name = evaluation.name.removeprefix("perplexity").strip("-")
    return (f", {name}" if name else "") + (f", in windows of {window:,}" if window else "")


def _run(facts: RunFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    more = [("versions", versions)] if versions else []
    if facts.checkpoints:
        more.append(("checkpoints", ", ".join(facts.checkpoints)))
    return f"{tiles(progress(facts))}{facts_table([*overview(facts), *more])}"


def _training(facts: RunFacts) -> str:
    def line(key: str, label: str, style: int = 0) -> Line:
        return Line(label, points(facts.steps, key), style)

    def held_out(key: str) -> Line:
        return Line("held out", points(facts.held_out, key), 1)

    def smoothed(key: str, label: str) -> list[Line]:
        """What was recorded; of many steps it is pale, and their running mean lies over it."""
        recorded = points(facts.steps, key)
        if len(recorded) < FEWEST:
            return [Line(label, recorded)]
        count = steps_of_a_mean(len(recorded))
        drawn = "recorded" if len(recorded) <= MAX_POINTS else "lowest and highest"
        return [Line(drawn, recorded, 4), Line(f"mean of {count}", running_mean(recorded, count))]

    planned = facts.plan and facts.plan.get("peak_gib")
    level = (f"planned {planned:.1f}", float(planned)) if isinstance(planned, int | float) else None
    chart = partial(line_chart, x_label="optimizer step", from_zero=True)
    losses = [*smoothed("loss", "training"), held_out("eval_loss")]
    padding = [line("padding_percent", "padding", 0), line("data_wait_percent", "waiting for data", 1)]
    pairs = [line("rewards/accuracies", "training"), held_out("eval_rewards/accuracies")]
    charts = [
        chart(losses, name="Loss", y_label="per target token or pair", from_zero=False),
        chart(pairs, name="Accuracy", y_label="share of pairs") if pairs[0].points else "",
        chart([line("learning_rate", "learning rate")], name="Learning rate", y_label=""),
        chart(smoothed("grad_norm", "norm"), name="Gradient norm", y_label="before clipping"),
        chart(smoothed("tokens_per_s_per_gpu", "tokens/s"), name="Speed", y_label="tokens/s per rank"),
        chart([line("peak_gib", "peak so far, fullest rank")], name="Memory", y_label="GiB per rank", level=level),
        chart(padding, name="Padding and balance", y_label="percent of tokens, percent of time"),
    ]
    return f"<div class=pair>{''.join(charts)}</div>" if any(charts) else ""


def _data(facts: RunFacts) -> str:
    parts = []
    for name, statistics in facts.data.items():
        bars = [(f"up to {int(up_to):,}", count) for up_to, count in statistics.get("rows_up_to_tokens", {}).items()]
        chart = bar_chart(bars, name="tokens of a row", unit="rows")
        parts.append(f"<div><h3>{escape(name)}</h3>{facts_table(data_rows(statistics))}{chart}</div>")
    return f"<div class=pair>{''.join(parts)}</div>" if parts else ""


def _evaluation(evaluation: Evaluation) -> str:
    results = evaluation.pair
    different = differences_line(evaluation)
    notes = f"<p class=bad>{escape(different)}</p>" if different else ""
    made = "".join(
        f"<p><b>{label}</b> <small>{escape('; '.join((r['model'], r['date'], settings_line(r))))}</small></p>"
        for label, r in results
    )
    columns, rows = evaluation_rows(evaluation)
    numbers = wide(table(columns, rows, evaluation.title), evaluation.title)
    picture = ""
    if evaluation.kind == "needle" and evaluation.name != "needle":  # its grid is in the first section
        languages = dict.fromkeys(language for _, r in results for language in r["grid"])
        grids = [wide(grid, name) for language in languages for name, grid in _heat(results, language)]
        picture = f"<div class=heats>{''.join(grids)}</div>"
    long = len(rows) > 12 or evaluation.kind == "perplexity"  # its curves are in the first section
    return (
        notes
        + picture
        + (details(f"{len(rows)} numbers", numbers) if long else numbers)
        + (details("How it was made", made))
    )


def _curve(result: dict[str, Any]) -> list[tuple[float, float]]:
    edges, values = result["edges_tokens"], result["loss_by_bucket"]
    return [((edges[i] + edges[i + 1]) / 2, v) for i, v in enumerate(values) if v is not None]


def _heat(results: Sequence[tuple[str, dict[str, Any]]], language: str) -> Iterable[tuple[str, str]]:
    """(name, grid) of one language, before and after next to each other."""
    for label, result in results:
        columns = [_tokens(n) for n in result["lengths"]]
        grid = result["grid"].get(language, [])
        rows = [(f"{100 * depth:g} %", values) for depth, values in zip(result["depths"], grid, strict=False)]
        if rows:
            name = f"{label}, {language}: facts found, %"
            yield name, heat_table(columns, rows, name=name, corner="depth")


def _samples(facts: RunFacts) -> str:
    parts = []
    if facts.sample:
        s = facts.sample
        origin = f"<small>{escape(s['origin'])}, {s['tokens']:,} tokens; the trained part is marked</small>"
        text = f"{escape(s['before'])}<mark>{escape(s['trained'])}</mark>"
        parts.append(details("A training row", f"{origin}<pre>{text}</pre>", opened=True))
    for evaluation in _in_order(facts.evaluations):
        for label, result in evaluation.pair:
            if result.get("samples"):
                body = "".join(_sample(sample) for sample in result["samples"])
                parts.append(details(f"{evaluation.title}, {label}", f"<ul>{body}</ul>"))
    return "".join(parts)


def _sample(sample: dict[str, Any]) -> str:
    right = sample.get("exact", sample.get("right"))
    wanted = sample["answer"] if sample["answers"] is None else ", ".join(sample["answers"])
    place = ""
    if (tokens := sample["length_tokens"]) is not None:
        depths = ", ".join(f"{100 * d:.0f} %" for d in sample["stands_at"])
        place = f"<small>{tokens:,} tokens, at {depths}: {escape(' '.join(sample['hidden']))}</small><br>"
    verdict = "right" if right else "wrong"
    return (
        f"<li>{place}{escape(sample['question'])}<br>expected {escape(wanted)}, "
        f"<span class={verdict}>{verdict}: {escape(sample['reply'])}</span></li>"
    )


def _again(facts: RunFacts) -> str:
    config = details("config.yaml", f"<pre class=copy>{escape(facts.config_text)}</pre>")
    return commands(reproduce(facts)) + config


def _in_order(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    order = list(TITLES)
    return sorted(evaluations, key=lambda e: (order.index(e.kind) if e.kind in order else len(order), e.name))


def comparison_page(runs: Sequence[RunFacts]) -> str:
    """The whole page."""
    names = _names(runs)
    settings = _by_key([dict(overview(run)) for run in runs])
    different = [row for row in settings if len(set(row[1:])) > 1]
    results = _by_key([{**{what: after for what, _, after in verdict(run)}, **dict(progress(run))} for run in runs])
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


def _by_key(of_runs: Sequence[dict[str, str]]) -> list[list[str]]:
    keys = dict.fromkeys(key for facts in of_runs for key in facts)
    return [[key, *(facts.get(key, "-") for facts in of_runs)] for key in keys]
