"""LongBench's rows and prompt templates, from the user's copy or the hub; nothing of it is part of this package.

A copy is a folder with the data sets as `<task>.jsonl` (LongBench-E: `<task>_e.jsonl`) at its top or in `data/`, and
`dataset2prompt.json` at its top or in `config/`: what `data.zip` of the hub set and `config` of its code hold.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.longbench.tasks import Task, classification

HUB_SET = "zai-org/LongBench"  # was THUDM/LongBench, which is forwarded
PROMPTS = "dataset2prompt.json"


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
