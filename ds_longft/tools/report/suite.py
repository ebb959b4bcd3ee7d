"""`ds-longft eval suite`: what a run changed, in one command and one table, before and after it."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_longft.errors import ConfigError
from ds_longft.ranks.join import visible_gpus
from ds_longft.run_files import EvaluationRow, Preset
from ds_longft.stored import read_lines
from ds_longft.tools.evaluate.evaluation import mean_with_interval, show_result
from ds_longft.tools.evaluate.flags import RANKS, Flags, Ranks, token_list
from ds_longft.tools.evaluate.longbench.choices import RESERVED_TOKENS, read_choices, v2
from ds_longft.tools.evaluate.longproc.command import choose, longproc, read_problems
from ds_longft.tools.evaluate.needle import needle
from ds_longft.tools.evaluate.ruler.command import ruler
from ds_longft.tools.evaluate.ruler.ruler_rows import choose as choose_ruler
from ds_longft.tools.evaluate.short import short
from ds_longft.tools.report.command import add_to_card, write_report
from ds_longft.tools.report.run_facts import RunFacts, gather_facts
from ds_longft.tools.report.tables import suite_rows

Scored = dict[str, dict[str, dict[str, float]]]
"""Measure -> part (a task, a place in the text) -> key of a row -> its value."""


@dataclass(frozen=True)
class Size:
    """How much is asked."""

    rows: int  # of each RULER task and length
    trials: int  # of each needle cell
    answers: str  # lengths of LongProc
    choices: int | None  # rows of LongBench v2; None: all


SIZES: Mapping[Preset, Size] = {
    "quick": Size(rows=4, trials=1, answers="0.5k", choices=50),
    "paper": Size(rows=50, trials=4, answers="0.5k,2k", choices=None),
}


def suite(
    run: str,
    *,
    preset: Preset = "quick",
    lengths: str | None = None,
    rows: int | None = None,
    essays: str | None = None,
    squad: str | None = None,
    hotpotqa: str | None = None,
    longproc_data: str | None = None,
    longbench_v2: str | None = None,
    base: str | None = None,
    json: bool = False,
    flags: Ranks = RANKS,
) -> None:
    """RULER, needles, short questions and more of a run and of the model it started from, on the same prompts.

    One table: each figure before and after with a 95 % interval (bootstrap over rows), and the difference with its own,
    row by row. It goes to RUN/eval/suite.json, RUN/report.html and, with the figures as `model-index`, RUN/README.md.
    Stopped and started again, it goes on. Without --gpus all GPUs of this machine share the work.

    Args:
        run: output folder of a finished run.
        preset: quick (4 rows of each RULER task, at a quarter of the window and the whole of it) or paper (50 rows, 4K
            and its doublings up to the window).
        lengths: in tokens, instead of the preset's.
        rows: of each RULER task and length, instead of the preset's.
        essays: what RULER's needles are hidden in; see `eval ruler`.
        squad: SQuAD's dev-v2.0.json.
        hotpotqa: hotpot_dev_distractor_v1.json.
        longproc_data: your copy of LongProc's data folder, which is asked too: as many rows of each task, with answers
            of 0.5k, with the preset paper of 2k as well.
        longbench_v2: your copy of LongBench v2's data.json, which is asked too: 50 rows, with the preset paper all.
        base: the base model of an adapter, where it has moved.
        json: print one JSON object instead of a table.
    """
    if rows is not None and rows < 1:
        raise ConfigError(f"--rows is {rows}: expected 1 or more")
    flags.check()
    if flags.gpus is None and flags.weights != "sharded":
        flags = replace(flags, gpus=max(flags.sp, visible_gpus() // flags.sp * flags.sp))
    given, size = None if lengths is None else token_list("--lengths", lengths), SIZES[preset]
    texts: dict[str, Any] = {"essays": essays, "squad": squad, "hotpotqa": hotpotqa}
    data = {"longproc_data": longproc_data, "longbench_v2": longbench_v2}
    _check(texts, data, size)
    from ds_longft.tools.evaluate import results  # brings torch
    from ds_longft.tools.evaluate.subject import find_subject, subject_window

    find_subject(run, before=True, base=base)
    after = find_subject(run, base=base)
    sizes = given or _lengths(preset, subject_window(after) or 8192)
    folder = results.result_folder(after, None)
    asks: dict[str, Callable[..., None]] = {
        "ruler": partial(ruler, run, lengths=",".join(map(str, sizes)), rows=rows or size.rows, **texts),
        "needle": partial(needle, run, lengths=",".join(map(str, sizes)), trials=size.trials),
        "short": partial(short, run),
    }
    if longproc_data:
        asks["longproc"] = partial(longproc, run, longproc_data, lengths=size.answers, limit=rows or size.rows)
    if longbench_v2:  # the same prompts, whatever the window
        most = max(sizes) - RESERVED_TOKENS
        asks["longbench-v2"] = partial(v2, run, longbench_v2, max_length=most, limit=size.choices)
    with contextlib.redirect_stdout(sys.stderr):
        for before in (True, False):
            for ask in asks.values():
                ask(flags=Flags(**asdict(flags), base=base, before=before))
    result = {
        "kind": "suite",
        "model": after.shown,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "settings": {"preset": preset, "lengths": sizes, "rows": rows, **data, **texts},
        "measures": compared(_scored(folder, list(asks), results.BEFORE), _scored(folder, list(asks), "")),
    }
    path = folder / "suite.json"
    results.write_result(path, result)
    _report(gather_facts(Path(run).expanduser()))
    show_result((result, path), json, _show)


def _check(texts: dict[str, Any], data: dict[str, str | None], size: Size) -> None:
    """What is wrong with the files that are asked about, and what is not installed, before hours of answers."""
    choose_ruler("all", {"qa_1": texts["squad"], "qa_2": texts["hotpotqa"]})
    if folder := data["longproc_data"]:
        for task, answers in choose("all", size.answers, run_code=False):
            read_problems(folder, task, answers, 1)
    if file := data["longbench_v2"]:
        read_choices(file, 1)


def _lengths(preset: Preset, window: int) -> list[int]:
    if preset == "quick":
        return sorted({max(1024, window // 4), window})
    return [4096 << i for i in range((window // 4096).bit_length())] or [window]


def _scored(folder: Path, kinds: Sequence[str], ending: str) -> Scored:
    """The values of every row of the evaluations."""
    readers: dict[str, Callable[[dict[str, Any]], tuple[str, str, float]]] = {
        "ruler": lambda row: (f"RULER {row['length_tokens']:,}, %", row["task"], 100 * row["score"]),
        "needle": lambda row: (f"needles {row['length_tokens']:,}, %", str(row["depth"]), 100.0 * row["exact"]),
        "longproc": lambda row: (f"LongProc {row['answer_length']}, %", row["task"], 100 * row["score"]),
        "longbench-v2": lambda row: ("LongBench v2, %", "", 100.0 * (row["reply"] == row["answer"])),
        "short": lambda row: (
            ("loss of short texts", "", row["loss"])
            if "loss" in row
            else ("short questions, %", "", 100.0 * row["right"])
        ),
    }
    scored: Scored = {}
    for name in kinds:
        for row in read_lines(folder / f"{name}{ending}.rows.jsonl", EvaluationRow)[0][1:]:
            measure, part, value = readers[name](row)
            scored.setdefault(measure, {}).setdefault(part, {})[row["key"]] = value
    return scored


def compared(before: Scored, after: Scored) -> list[dict[str, Any]]:
    """Each measure of both: [mean, low, high] before, after, and of the difference, taken row by row."""
    made = []
    for measure in (name for name in after if name in before):
        parts = [(rows, after[measure][part]) for part, rows in before[measure].items()]
        pairs = [[(old[key], new[key]) for key in old] for old, new in parts]
        made.append(
            {
                "name": measure,
                "rows": sum(map(len, pairs)),
                "before": mean_with_interval([[old for old, _ in part] for part in pairs]),
                "after": mean_with_interval([[new for _, new in part] for part in pairs]),
                "difference": mean_with_interval([[new - old for old, new in part] for part in pairs]),
            }
        )
    return made


def _report(facts: RunFacts) -> None:
    """The page and the card, with the table in them."""
    write_report(facts, facts.folder / "report.html")
    add_to_card(facts, facts.folder / "README.md")


def _show(result: dict[str, Any], path: Path) -> None:
    columns, lines = suite_rows(result)
    table = Table(*columns)
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.print(table)
    console.print(f"{path}; {path.parent.parent / 'report.html'}", soft_wrap=True, highlight=False)
