"""`ds-longft eval longproc`: long procedures written out step by step, asked and scored as published.

Rows, prompts and references are those of the user's copy of its `data` folder; nothing of it is part of this package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ds_longft.config.yaml_io import load_yaml
from ds_longft.errors import ConfigError, DataError
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
from ds_longft.tools.evaluate.longproc.procedures import COUNTDOWN_EXAMPLES, countdown, travel
from ds_longft.tools.evaluate.longproc.scores import SCORES, check_compiler

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

SIZES = {"0.5k": 1024, "2k": 3072, "8k": 9216}  # of the answer: what it is called, and its tokens at most
LENGTHS = {
    "countdown": ("0.5k", "2k", "8k"),
    "path_traversal": ("0.5k", "2k", "8k"),
    "tom_tracking": ("0.5k", "2k", "8k"),
    "html_to_tsv": ("0.5k", "2k", "8k"),
    "pseudo_to_code": ("0.5k", "2k"),
    "travel_planning": ("2k", "8k"),
}
TRAVEL_TOKENS = {"2k": (0, 2048), "8k": (4096, 8192)}  # `estimated_output_tokens` of a row
RUNS_CODE = "pseudo_to_code"
ALIKE_TOKENS = 1024


@dataclass(frozen=True)
class Problem:
    """One row: what is asked, and what the published reply is."""

    prompt: str
    reference: str
    row: dict[str, Any]


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

    Countdown, path traversal, theory-of-mind tracking, HTML to TSV, pseudocode to C++, travel planning.

    Args:
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


def read_problems(folder: str, task: str, size: str, limit: int | None) -> list[Problem]:
    """The first rows of a task at a length.

    Raises:
        DataError: a file is missing, or is not what LongProc holds.
    """
    data = Path(folder).expanduser()
    data = data / "data" if (data / "data" / task).is_dir() else data
    here, name = data / task, "travel_planning_all" if task == "travel_planning" else f"{task}_{size}"
    try:
        template = load_yaml((here / "prompts.yaml").read_text(encoding="utf-8"))["USER_PROMPT"]
        rows = _read(here / f"{name}.json")
        if task == "travel_planning":
            least, most = TRAVEL_TOKENS[size]
            rows = [row for row in rows if least <= row["estimated_output_tokens"] < most]
        shown = _shown(here, task)
        return [_problem(template, data, task, row, shown) for row in rows[:limit]]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}: expected LongProc's data folder, with {task}/") from error
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise DataError(f"{here}: {name}.json or prompts.yaml is not LongProc's ({error!r})") from error


def _shown(here: Path, task: str) -> str:
    """The worked examples of a prompt that are computed."""
    if task == "countdown":
        return "\n\n".join(
            f"# Example\nNumbers: {list(numbers)}\nTarget: {target}\n\n{countdown(numbers, target)}"
            for numbers, target in COUNTDOWN_EXAMPLES
        )
    if task == "travel_planning":
        examples = _read(here / "travel_planning_icl_examples.json")
        return "\n\n".join(f"# Example\n{row['disambig_question_text']}\n\n{travel(row)}" for row in examples)
    return ""


def _problem(template: str, data: Path, task: str, row: dict[str, Any], shown: str) -> Problem:
    filled = row
    if task == "countdown":
        filled, reference = row | {"demonstration": shown}, countdown(row["nums"], row["target"])
    elif task == "travel_planning":
        filled, reference = {"demonstration": shown, "problem": row["disambig_question_text"]}, travel(row)
    elif task == "path_traversal":
        begin, end = row["question_repr"][:2]
        filled, reference = {"city_context": row["context_nl"], "src_city": begin, "dst_city": end}, row["answer_nl"]
    elif task == "pseudo_to_code":
        filled, reference = {"pseudocode": "\n".join(row["pseudocode_lines"])}, "\n".join(row["code_lines"])
    elif task == "html_to_tsv":
        page = data / task / row["html_path"].partition(f"{task}/")[2]  # written as seen from its repository
        filled, reference = row | {"html_str": page.read_text(encoding="utf-8")}, row["gt"]
    else:
        reference = row["solution"]
    return Problem(template.format(**filled), reference, row)


def _read(file: Path) -> Sequence[dict[str, Any]]:
    return json.loads(file.read_text(encoding="utf-8"))


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
