"""`ds-longft eval longproc`: long procedures written out step by step, asked and scored as published."""

from __future__ import annotations

from functools import partial
from pathlib import Path
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
from ds_longft.tools.evaluate.flags import FLAGS, Flags, listed, positive, print_tables
from ds_longft.tools.evaluate.haystack import encode_prompt
from ds_longft.tools.evaluate.longproc.problems import LENGTHS, SIZES, Problem, read_problems
from ds_longft.tools.evaluate.longproc.scores import SCORES, check_compiler

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

RUNS_CODE = "pseudo_to_code"
ALIKE_TOKENS = 1024


def longproc(
    model: str,
    data: str,
    *,
    tasks: str = "all",
    lengths: str = "0.5k,2k,8k",
    limit: int | None = None,
    run_code: bool = False,
    flags: Flags = FLAGS,
) -> None:
    """Ask LongProc: long answers that follow a procedure, scored by program.

    Countdown, path traversal, theory-of-mind tracking, HTML to TSV, pseudocode to C++, travel planning. The result goes
    to RUN/eval/longproc.json (longproc-before.json with --before). Stopped and started again with the same settings, it
    goes on.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        data: your copy of the `data` folder of princeton-pli/LongProc, or of the repository.
        tasks: names separated by commas, or all.
        lengths: of the answers: 0.5k, 2k, 8k.
        limit: only the first so many rows of each task and length.
        run_code: compile and run the programs that the model writes, on this machine, with your rights. Without it
            pseudo_to_code is left out.
    """
    arguments = dict(locals())
    positive(limit=limit)
    chosen = choose(tasks, lengths, run_code)
    if run_code:
        check_compiler()
    problems = {(task, size): read_problems(data, task, size, limit) for task, size in chosen}
    told = {"data": data, "limit": limit, "run_code": run_code}
    evaluate_on_ranks("eval longproc", arguments, lambda answering: _measure(answering, problems, told), _show)


def choose(tasks: str, lengths: str, run_code: bool) -> list[tuple[str, str]]:
    """Tasks and lengths that are asked. Raises ConfigError: an unknown one, or one that runs code, not allowed to."""
    wanted, sizes = listed(tasks), listed(lengths)
    unknown = [task for task in wanted if task not in LENGTHS and task != "all"]
    if unknown or not wanted or not sizes or not set(sizes) <= set(SIZES):
        seen = f"--tasks is {tasks!r}, --lengths is {lengths!r}"
        raise ConfigError(f"{seen}: expected all or some of {', '.join(LENGTHS)}, and of {', '.join(SIZES)}")
    if RUNS_CODE in wanted and not run_code:
        raise ConfigError(f"--tasks: {RUNS_CODE} runs what the model writes on this machine: allow it with --run_code")
    named = [task for task in LENGTHS if task in wanted or ("all" in wanted and (task != RUNS_CODE or run_code))]
    return [(task, size) for task in named for size in LENGTHS[task] if size in sizes]


def _measure(answering: Answering, problems: dict[tuple[str, str], list[Problem]], told: dict[str, Any]) -> Result:
    def made(task: str, size: str, problem: Problem) -> Made:
        ids = encode_prompt(answering.tokenizer, problem.prompt)
        return ids, lambda reply, _: {
            "task": task, "answer_length": size, "prompt_tokens": len(ids), "reply": reply,
            **{name: round(x, 4) for name, x in SCORES[task](reply, problem.reference, problem.row).items()},
        }  # fmt: skip

    def tokens(problem: Problem) -> int:
        """Of the prompt, to the next thousand: those of one size are asked together."""
        return -(-len(encode_prompt(answering.tokenizer, problem.prompt)) // ALIKE_TOKENS) * ALIKE_TOKENS

    questions = {
        f"{task}/{size}/{i}": Question(tokens(problem), SIZES[size], partial(made, task, size, problem))
        for (task, size), of in problems.items()
        for i, problem in enumerate(of)
    }
    asked = [[problem.prompt, problem.reference] for of in problems.values() for problem in of]
    settings = {**told, "tasks": sorted({task for task, _ in problems}), "lengths": sorted({s for _, s in problems})}
    settings["data_fingerprint"] = fingerprint(asked)
    return answering.ask("longproc", settings, questions, _summary)


def _summary(rows: list[Row]) -> dict[str, Any]:
    """Scores in percent by task and length of the answer, and the mean of the tasks at each length."""
    of: dict[str, dict[str, list[float]]] = {}
    for row in sorted(rows, key=lambda row: (float(row["answer_length"].rstrip("k")), row["task"])):
        of.setdefault(row["answer_length"], {}).setdefault(row["task"], []).append(100 * row["score"])
    whole = {size: mean_with_interval(list(tasks.values())) for size, tasks in of.items()}
    return {
        "averages": {f"answers of {size}": mean for size, (mean, _, _) in whole.items()},
        "intervals": {f"answers of {size}": ends for size, (_, *ends) in whole.items()},
        "scores": {
            f"{task} {size}": round(sum(x) / len(x), 2) for size, tasks in of.items() for task, x in tasks.items()
        },
        "rows": len(rows),
    }


def _show(result: dict[str, Any], path: Path) -> None:
    table = Table("LongProc", "%", "95 %")
    for name, value in result["scores"].items():
        table.add_row(name, f"{value:.1f}", "")
    table.add_section()
    for name, mean in result["averages"].items():
        low, high = result["intervals"][name]
        table.add_row(f"mean, {name}", f"{mean:.1f}", f"{low:.1f} to {high:.1f}", style="bold")
    print_tables(path, table)
