"""`ds-longft eval ruler`: the thirteen tasks of RULER at any length, asked and scored as published."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.evaluation import (
    Made,
    Question,
    Result,
    Row,
    evaluate_on_ranks,
    fingerprint,
    mean_with_interval,
)  # fmt: skip
from ds_longft.tools.evaluate.flags import FLAGS, Flags, default_lengths, positive, print_tables, token_list
from ds_longft.tools.evaluate.ruler.ruler_rows import answer_tokens, choose, made_row, read_material, score
from ds_longft.tools.evaluate.texts import CHARACTERS_A_TOKEN, read_texts

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

SHOWN_CHARACTERS = 300  # of a prompt's end, in the rows


def ruler(
    model: str,
    *,
    lengths: str | None = None,
    tasks: str = "all",
    rows: int = 20,
    essays: str | None = None,
    squad: str | None = None,
    hotpotqa: str | None = None,
    seed: int = 42,
    flags: Flags = FLAGS,
) -> None:
    """Ask RULER's 13 tasks: needles of eight kinds, variable tracking, common and frequent words, documents.

    The prompts are made here, so long that with the answer they fill a length and never exceed it, and asked in the
    model's chat template with the beginning of the answer.

    Args:
        lengths: tokens of prompt and answer, e.g. 4K,32K,128K. Left out: the model's window and four halvings of it.
        tasks: names separated by commas, or all.
        rows: of each task and length; published are 500.
        essays: text file, JSONL or folder that needles are hidden in; published are Paul Graham's essays. Left out: the
            Python documentation of this machine.
        squad: SQuAD's dev-v2.0.json for qa_1. Left out: own_qa_1, numbers in documents made here.
        hotpotqa: hotpot_dev_distractor_v1.json for qa_2. Left out: own_qa_2, numbers that two documents tell together.
        seed: the same seed asks the same questions.
    """
    arguments = dict(locals())
    positive(rows=rows)
    chosen = choose(tasks, {"qa_1": squad, "qa_2": hotpotqa})
    sizes = None if lengths is None else token_list("--lengths", lengths)

    told = {"tasks": chosen, "rows": rows, "essays": essays, "squad": squad, "hotpotqa": hotpotqa, "seed": seed}
    evaluate_on_ranks("eval ruler", arguments, lambda answering: _measure(answering, told, sizes), _show)


def _measure(answering: Answering, told: dict[str, Any], lengths: list[int] | None) -> Result:
    tasks, seed, tokenizer = told["tasks"], told["seed"], answering.tokenizer
    sizes = lengths or default_lengths(answering.window)
    texts = read_texts(told["essays"], "en", characters=CHARACTERS_A_TOKEN * max(sizes))
    material = read_material(tokenizer, texts, {"qa_1": told["squad"], "qa_2": told["hotpotqa"]}, tasks)
    for task, questions in material.questions.items():
        if len(questions) < told["rows"]:
            raise ConfigError(f"--rows is {told['rows']}: the file of {task} has {len(questions)} questions")
    of_texts = fingerprint([material.essay, *material.documents.values()])

    def made(task: str, size: int, i: int) -> Made:
        text, ids = made_row(tokenizer, material, task, size, i, seed)
        return ids, lambda reply, _: {
            "task": task,
            "length_tokens": size,
            "prompt_tokens": len(ids),
            "question": f"{text.asked[-SHOWN_CHARACTERS:]} {text.begins}",
            "answers": list(text.wanted),
            "reply": reply,
            "score": round(score(task, text.wanted, reply), 4),
        }

    asked = {
        f"{task}/{size}/{i}": Question(size, answer_tokens(task), partial(made, task, size, i))
        for size, task, i in product(sizes, tasks, range(told["rows"]))
    }
    settings = {**told, "lengths": sizes, "texts_fingerprint": of_texts}
    return answering.ask("ruler", settings, asked, lambda rows: _summary(rows, tasks, sizes))


def _summary(rows: list[Row], tasks: list[str], sizes: list[int]) -> dict[str, Any]:
    """Scores in percent by task and length, their mean by length with its interval, and some rows to read."""
    scores: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        scores.setdefault((row["task"], row["length_tokens"]), []).append(100 * row["score"])
    whole = {str(size): mean_with_interval([scores[task, size] for task in tasks]) for size in sizes}
    shown = ("question", "answers", "reply")
    wrong = sorted(rows, key=lambda row: (row["score"], -row["length_tokens"]))[:6]
    return {
        "averages": {size: mean for size, (mean, _, _) in whole.items()},
        "intervals": {size: ends for size, (_, *ends) in whole.items()},
        "by_length": {task: {str(size): round(fmean(scores[task, size]), 2) for size in sizes} for task in tasks},
        "samples": [{key: row[key] for key in shown} | {"right": row["score"] == 1} for row in wrong],
    }


def _show(result: dict[str, Any], path: Path) -> None:
    table = Table("RULER, %", *(f"{int(size):,}" for size in result["averages"]))
    for task, values in result["by_length"].items():
        table.add_row(task, *(f"{value:.1f}" for value in values.values()))
    table.add_section()
    table.add_row("mean", *(f"{value:.1f}" for value in result["averages"].values()), style="bold")
    table.add_row("95 %", *(f"{low:.1f} to {high:.1f}" for low, high in result["intervals"].values()))
    print_tables(path, table)
