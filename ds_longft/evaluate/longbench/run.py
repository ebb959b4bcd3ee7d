"""`ds-longft eval longbench run`: answers of a model to LongBench or LongBench-E, and their scores."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Any

from ds_longft.errors import ConfigError
from ds_longft.evaluate.longbench.data import find_copy, read_prompts, read_task
from ds_longft.evaluate.longbench.metrics import check_packages
from ds_longft.evaluate.longbench.score import print_scores, scores_by_length, task_scores
from ds_longft.evaluate.longbench.tasks import TASKS, Task, averages
from ds_longft.evaluate.needle import tokens_of

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
    before: bool = False,
    base: str | None = None,
    out: str | None = None,
    name: str | None = None,
    json: bool = False,
) -> None:
    """Answer LongBench greedily as its own code does, and score the answers.

    Answers go to RUN/eval/longbench.rows.jsonl as they are made (`eval longbench score` reads them too), scores to
    RUN/eval/longbench.json. Stopped and started again with the same settings, it goes on. One GPU, or the CPU.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        data: folder of LongBench's data sets. Left out: fetched from the hub.
        prompts: dataset2prompt.json. Left out: looked for in that folder.
        tasks: names separated by commas, en, zh, code, or all.
        e: LongBench-E: 13 tasks, scores by length as well.
        max_length: prompt tokens; the middle of longer ones is cut. Left out: the window less 500.
        limit: only the first so many rows of each task.
        chunk_tokens: tokens of a prompt that are read at a time.
        before: evaluate the model that the run MODEL started from.
        base: the base model of an adapter, where it has moved.
        out: folder of the results. Left out: RUN/eval, or eval/<model>.
        name: of the result. Left out: longbench, or longbench-e.
        json: print one JSON object instead of tables.
    """
    from ds_longft.evaluate import results
    from ds_longft.evaluate.cached_attention import CACHED, register
    from ds_longft.evaluate.generate import end_ids, generate
    from ds_longft.evaluate.subject import find_subject, load_subject, one_device, subject_tokenizer

    register()
    chosen = choose_tasks(tasks, e=e)
    check_packages()
    chunk = tokens_of("--chunk_tokens", chunk_tokens)
    copy = find_copy(data)
    templates = read_prompts(copy, prompts)
    sets = {task.name: read_task(copy, task.name + ("_e" if e else ""))[:limit] for task in chosen}
    subject = find_subject(model, before=before, base=base)
    tokenizer = subject_tokenizer(subject)
    loaded = load_subject(subject, one_device(), attention=CACHED)
    longest = tokens_of("--max_length", max_length) if max_length else (loaded.window or 8192) - RESERVED_TOKENS
    settings = {
        "weights": results.weights_identity(subject),
        "tasks": [task.name for task in chosen],
        "e": e,
        "max_length_tokens": longest,
        "limit": limit,
    }
    kind = "longbench-e" if e else "longbench"
    folder, file = results.result_folder(subject, out), results.result_name(name, kind, before)
    rows = results.Rows(folder, file, settings, total=sum(map(len, sets.values())))
    done = {row["key"] for row in rows.rows}
    stops = end_ids(loaded, tokenizer)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    for task in chosen:
        for i, row in enumerate(sets[task.name]):
            key = f"{task.name}/{i}"
            if key in done:
                continue
            ids = prompt_ids(tokenizer, templates[task.name].format(**row), task, longest)
            line_by_line = task.name == "samsum"  # one dialogue's summary is one line
            reply = generate(
                loaded,
                [ids],
                max_new_tokens=task.max_new_tokens,
                stop_ids=stops | set(newline) if line_by_line else stops,
                chunk_tokens=chunk,
                min_new_tokens=1 if line_by_line else 0,
            )[0]
            rows.add(
                {
                    "key": key,
                    "dataset": task.name,
                    "pred": tokenizer.decode(reply, skip_special_tokens=True),
                    "answers": row["answers"],
                    "all_classes": row.get("all_classes"),
                    "length": row.get("length"),
                    "prompt_tokens": len(ids),
                }
            )
    result = rows.finish(kind, subject.shown, _scores(rows.rows, e))
    if json:
        print(json_text.dumps(result, ensure_ascii=False))
        return
    print_scores(result)
    print(Path(rows.result_path))


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
    if task.chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return list(tokenizer(text, verbose=False)["input_ids"])


def _scores(rows: list[dict[str, Any]], e: bool) -> dict[str, Any]:
    scores = task_scores(rows)
    counts = {task: sum(row["dataset"] == task for row in rows) for task in scores}
    lengths = {"by_length": scores_by_length(rows)} if e else {}
    return {"scores": scores, "averages": averages(scores), "rows": counts, **lengths}
