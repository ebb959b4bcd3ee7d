"""`ds-longft eval longbench run`: answers of a model to LongBench or LongBench-E, and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.haystack import encode_prompt
from ds_longft.tools.evaluate.longbench.score import print_scores, scores_by_length, task_scores
from ds_longft.tools.evaluate.longbench.task_metrics import check_packages
from ds_longft.tools.evaluate.longbench.task_rows import find_copy, read_prompts, read_task
from ds_longft.tools.evaluate.longbench.tasks import TASKS, Task, averages
from ds_longft.tools.evaluate.needle import tokens_of

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

RESERVED_TOKENS = 500  # of the window, for the chat template and the answer, as in LongBench's own list


def run(
    model: str,
    *,
    data: str | None = None,
    prompts: str | None = None,
    tasks: str = "all",
    e: bool = False,
    max_length: int | str | None = None,
    limit: int | None = None,
    chunk_tokens: int | str = "8K",
    gpus: int = 1,
    before: bool = False,
    base: str | None = None,
    out: str | None = None,
    name: str | None = None,
    json: bool = False,
) -> None:
    """Answer LongBench greedily as its own code does, and score the answers.

    Answers go to RUN/eval/longbench.rows.jsonl as they are made (`eval longbench score` reads them too), scores to
    RUN/eval/longbench.json. Stopped and started again with the same settings, it goes on. With --gpus N every GPU
    answers its share; each holds the model.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        data: folder of LongBench's data sets. Left out: fetched from the hub.
        prompts: dataset2prompt.json. Left out: looked for in that folder.
        tasks: names separated by commas, en, zh, code, or all.
        e: LongBench-E: 13 tasks, scores by length as well.
        max_length: prompt tokens; the middle of longer ones is cut. Left out: the window less 500.
        limit: only the first so many rows of each task.
        chunk_tokens: tokens of a prompt that are read at a time.
        gpus: how many GPUs of this machine to use; on a CPU, processes.
        before: evaluate the model that the run MODEL started from.
        base: the base model of an adapter, where it has moved.
        out: folder of the results. Left out: RUN/eval, or eval/<model>.
        name: of the result. Left out: longbench, or longbench-e.
        json: print one JSON object instead of tables.
    """
    arguments = dict(locals())
    from ds_longft.tools.evaluate.processes import Processes, start_ranks

    chosen = choose_tasks(tasks, e=e)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}: expected 1 or more")
    check_packages()
    longest = tokens_of("--max_length", max_length) if max_length else None
    chunk = tokens_of("--chunk_tokens", chunk_tokens)
    if start_ranks("longbench run", "--gpus", gpus, arguments):
        return
    from ds_longft.tools.evaluate import results  # brings torch: not in a process that only starts others
    from ds_longft.tools.evaluate.answering import Answering, Target

    with Processes.of_launch() as processes:
        copy = processes.first(lambda: find_copy(data))  # it may unpack a download, which one process should do
        templates = read_prompts(copy, prompts, [task.name for task in chosen])
        sets = {task.name: read_task(copy, task, e=e)[:limit] for task in chosen}
        told = {"tasks": [t.name for t in chosen], "e": e, "limit": limit, "data": data, "prompts": prompts}
        told["data_fingerprint"] = results.fingerprint([{t: templates[t] for t in sets}, *sets.items()])
        asked = Asked(chosen, sets, templates, longest, told)
        made = _measure(Answering(processes, Target(model, before, base, out, name), chunk), asked)
    results.show(made, json, _show)


def _show(result: dict[str, Any], path: Path) -> None:
    print_scores(result)
    print(path)


@dataclass(frozen=True)
class Asked:
    """What is asked."""

    tasks: list[Task]
    rows: dict[str, list[dict[str, Any]]]  # by task
    templates: dict[str, str]
    max_length: int | None  # prompt tokens; None: the window less RESERVED_TOKENS
    settings: dict[str, Any]


def _measure(answering: Answering, asked: Asked) -> tuple[dict[str, Any], Path] | None:
    """The result and its file on the process that writes, None on the others."""
    tokenizer = answering.tokenizer
    longest = asked.max_length or (answering.loaded.window or 8192) - RESERVED_TOKENS
    e = asked.settings["e"]
    kind = "longbench-e" if e else "longbench"
    keys = {f"{task.name}/{i}": (task, i) for task in asked.tasks for i in range(len(asked.rows[task.name]))}
    done = answering.open_rows(kind, {**asked.settings, "max_length_tokens": longest}, len(keys))
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]

    def answer(key: str) -> list[dict[str, Any]]:
        task, i = keys[key]
        row = asked.rows[task.name][i]
        ids = prompt_ids(tokenizer, asked.templates[task.name].format(**row), task, longest)
        one_line = task.name == "samsum"  # one dialogue's summary
        (reply,) = answering.replies(
            [ids], task.max_new_tokens, also_stop=newline if one_line else (), least=int(one_line)
        )
        return [
            {
                "key": key,
                "dataset": task.name,
                "pred": reply,
                "answers": row["answers"],
                "all_classes": row.get("all_classes"),
                "length": row.get("length"),
                "prompt_tokens": len(ids),
            }
        ]

    return answering.fill(kind, [key for key in keys if key not in done], answer, lambda rows: _scores(rows, e))


def choose_tasks(names: str, *, e: bool) -> list[Task]:
    """Tasks by name, language or all, in LongBench's order.

    Raises:
        ConfigError: an unknown name, or one that LongBench-E does not have.
    """
    wanted = [part.strip() for part in names.strip("()[]").split(",") if part.strip()]
    unknown = [name for name in wanted if name not in TASKS and name not in ("all", "en", "zh", "code")]
    if unknown:
        raise ConfigError(f"--tasks: no task {', '.join(unknown)}; known are all, en, zh, code, {', '.join(TASKS)}")
    chosen = [t for t in TASKS.values() if {"all", t.language, t.name} & set(wanted) and (t.in_e or not e)]
    if not chosen:
        raise ConfigError(
            f"--tasks is {names!r}: LongBench-E has {', '.join(t.name for t in TASKS.values() if t.in_e)}"
        )
    return chosen


def prompt_ids(tokenizer: Any, text: str, task: Task, max_length: int) -> list[int]:
    """Token ids of a filled template: the middle cut out where it is too long, then put into the chat template.

    As LongBench's code does: both halves are decoded and joined before the template is added, so that the result may be
    some tokens longer than `max_length`. Few-shot and code tasks are continued as plain text.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) > max_length:
        half = max_length // 2
        text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return encode_prompt(tokenizer, text, chat=task.chat)


def _scores(rows: list[dict[str, Any]], e: bool) -> dict[str, Any]:
    scores = task_scores(rows)
    counts = {task: sum(row["dataset"] == task for row in rows) for task in scores}
    lengths = {"by_length": scores_by_length(rows)} if e else {}
    return {"scores": scores, "averages": averages(scores), "rows": counts, **lengths}
