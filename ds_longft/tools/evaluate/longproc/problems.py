"""LongProc's rows, prompts and references, from the user's copy of its `data` folder; nothing of it is part of this
package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_longft.config.yaml_io import load_yaml
from ds_longft.errors import DataError
from ds_longft.tools.evaluate.longproc.procedures import COUNTDOWN_EXAMPLES, countdown, travel

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


@dataclass(frozen=True)
class Problem:
    """One row: what is asked, and what the published reply is."""

    prompt: str
    reference: str
    row: dict[str, Any]


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
