"""`ds-longft eval longbench run`: answers of a model to LongBench or LongBench-E, and their scores.

Rows and prompt templates come from the user's copy or the hub; nothing of them is part of this package. A copy is a
folder with the data sets as `<task>.jsonl` (LongBench-E: `<task>_e.jsonl`) at its top or in `data/`, and
`dataset2prompt.json` at its top or in `config/`: what `data.zip` of the hub set and `config` of its code hold.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.evaluation import Made, Question, Result, evaluate_on_ranks, fingerprint
from ds_longft.tools.evaluate.flags import FLAGS, Flags, listed, positive, tokens_of
from ds_longft.tools.evaluate.haystack import encode_prompt, without_middle
from ds_longft.tools.evaluate.longbench.score import print_scores, scored
from ds_longft.tools.evaluate.longbench.tasks import TASKS, Task, check_packages, classification

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

HUB_SET = "zai-org/LongBench"  # was THUDM/LongBench, which is forwarded
PROMPTS = "dataset2prompt.json"
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
    flags: Flags = FLAGS,
) -> None:
    """Answer LongBench greedily as its own code does, and score the answers.

    Answers go to RUN/eval/longbench.rows.jsonl as they are made (`eval longbench score` reads them too).

    Args:
        data: folder of LongBench's data sets. Left out: fetched from the hub.
        prompts: dataset2prompt.json. Left out: looked for in that folder.
        tasks: names separated by commas, en, zh, code, or all.
        e: LongBench-E: 13 tasks, scores by length as well.
        max_length: prompt tokens; the middle of longer ones is cut. Left out: the window less 500.
        limit: only the first N rows of each task.
    """
    arguments = dict(locals())
    chosen = choose_tasks(tasks, e=e)
    positive(limit=limit)
    check_packages()
    longest = tokens_of("--max_length", max_length) if max_length else None

    told = {"tasks": [t.name for t in chosen], "e": e, "limit": limit, "data": data, "prompts": prompts}
    evaluate_on_ranks(
        "eval longbench run", arguments, lambda answering: _measure(answering, chosen, told, longest), _show
    )


def _show(result: dict[str, Any], path: Path) -> None:
    print_scores(result)
    print(path)


def _measure(answering: Answering, tasks: list[Task], told: dict[str, Any], most: int | None) -> Result:
    copy = answering.processes.first(lambda: find_copy(told["data"]))  # one process unpacks a download
    tokenizer, e = answering.tokenizer, told["e"]
    templates = read_prompts(copy, told["prompts"], told["tasks"])
    sets = {task.name: read_task(copy, task, e=e)[: told["limit"]] for task in tasks}
    longest = most or (answering.window or 8192) - RESERVED_TOKENS
    newline = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"][-1:])

    def made(task: Task, row: dict[str, Any]) -> Made:
        ids = prompt_ids(tokenizer, templates[task.name].format(**row), task, longest)
        return ids, lambda reply, _: {
            "dataset": task.name,
            "pred": reply,
            "answers": row["answers"],
            "all_classes": row.get("all_classes"),
            "length": row.get("length"),
            "prompt_tokens": len(ids),
        }

    questions = {}
    for task in tasks:
        one_line = task.name == "samsum"  # one dialogue's summary
        more: dict[str, Any] = {"also_stop": newline, "least_tokens": 1} if one_line else {}
        for i, row in enumerate(sets[task.name]):
            questions[f"{task.name}/{i}"] = Question(longest, task.max_new_tokens, partial(made, task, row), **more)
    told = {**told, "data_fingerprint": fingerprint([{t: templates[t] for t in sets}, *sets.values()])}
    kind, settings = "longbench-e" if e else "longbench", {**told, "max_length_tokens": longest}
    return answering.ask(kind, settings, questions, lambda rows: scored(rows, e))


def find_copy(folder: str | None) -> Path:
    """The user's folder, or the hub set's `data.zip` unpacked in the hub's cache.

    Raises:
        DataError: no folder, and the hub cannot be reached.
    """
    if folder is not None:
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise DataError(f"--data {folder}: there is no such folder")
        return path
    from huggingface_hub import hf_hub_download

    try:
        archive = Path(hf_hub_download(HUB_SET, "data.zip", repo_type="dataset"))
    except Exception as error:  # network, permissions, a moved set: each has its own class
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"LongBench cannot be fetched from the hub ({HUB_SET}: {why}): give a folder that holds its data and "
            f"{PROMPTS} with --data"
        ) from error
    unpacked = archive.parent / "unpacked"
    if not unpacked.is_dir():
        temporary = archive.parent / f".unpacked.{archive.stat().st_mtime_ns}"
        with zipfile.ZipFile(archive) as content:
            content.extractall(temporary)
        temporary.rename(unpacked)
    return unpacked


def read_prompts(copy: Path, file: str | None, tasks: Collection[str]) -> dict[str, str]:
    """Template of each task, with {context} and {input} to fill in.

    Raises:
        ConfigError: the file is nowhere (the hub set does not hold it: it lies in the code's `config` folder), or lacks
            one of these tasks.
    """
    places = [Path(file).expanduser()] if file else [copy / PROMPTS, copy / "config" / PROMPTS]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(
            f"no {PROMPTS} in {', '.join(map(str, places))}: it is LongBench/config/{PROMPTS} of the repository "
            "THUDM/LongBench; give it with --prompts"
        )
    templates = dict(json.loads(found.read_text(encoding="utf-8")))
    if missing := [task for task in tasks if task not in templates]:
        raise ConfigError(f"{found} has no prompt for {', '.join(missing)}: give another one with --prompts")
    return templates


def read_task(copy: Path, task: Task, *, e: bool) -> list[dict[str, Any]]:
    """Rows of a data set: input, context, answers, length, all_classes, _id. Some copies call the input `question`.

    Raises:
        DataError: there is no such file, a row is not JSON, or lacks what its prompt or its score needs.
    """
    name = task.name + ("_e" if e else "")
    file = next((f for f in (copy / f"{name}.jsonl", copy / "data" / f"{name}.jsonl") if f.is_file()), None)
    if file is None:
        raise DataError(f"{copy} holds no {name}.jsonl, nor does its folder data")
    try:
        # Not splitlines(): texts from the web hold line separators (U+2028, U+0085) that JSON leaves as they are.
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON lines: {error}") from error
    needed = ["input", "context", "answers"]
    needed += ["all_classes"] if task.metric is classification else []
    needed += ["length"] if e else []
    for number, row in enumerate(rows, start=1):
        row.setdefault("input", row.get("question"))
        if missing := [key for key in needed if row.get(key) is None]:
            raise DataError(f"{file}: row {number} has no {' and no '.join(missing)} (keys: {', '.join(row)})")
    return rows


def choose_tasks(names: str, *, e: bool) -> list[Task]:
    """Tasks by name, language or all, in LongBench's order.

    Raises:
        ConfigError: an unknown name, or one that LongBench-E does not have.
    """
    wanted = listed(names)
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
    """Token ids of a filled template, without its middle where it is too long, in the chat template. Few-shot and code
    tasks are continued as plain text.
    """
    cut = without_middle(tokenizer, text, tokenizer(text, verbose=False)["input_ids"], max_length)
    return encode_prompt(tokenizer, cut, chat=task.chat)
