"""Where precomputed log-probabilities of a reference model lie, and whose they are.

One file in the cache for each set of pairs and model that was its reference: float64 [pairs, 2], chosen and rejected,
NaN where a pair is still to be done. Its name holds the content of the pairs and a fingerprint of everything else the
numbers depend on: pairs that moved keep theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds_longft.config.run_config import RunConfig
from ds_longft.data.pairs import PairSet
from ds_longft.errors import DataError
from ds_longft.ranks.join import visible_gpus


def reference_facts(config: RunConfig) -> dict[str, Any]:
    """What decides the log-probabilities: the model's files or hub revision, RoPE change, arithmetic.

    The attention kernel and the ranks are not in it: they change rounding alone.
    """
    model = config.model
    folder = Path(model.path).expanduser()
    files: list[Any] = []
    if folder.is_dir():
        stats = [
            (f, f.stat()) for f in sorted(folder.glob("*")) if f.suffix == ".safetensors" or f.name == "config.json"
        ]
        files = [[file.name, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    bf16 = model.dtype == "bf16" or (model.dtype == "auto" and visible_gpus() > 0)
    return {
        "model": str(folder.resolve()) if folder.is_dir() else model.path,
        "revision": model.revision,
        "files": files,
        "random_weights": config.seed if model.random_weights else None,
        "dtype": "bf16" if bf16 else "fp32",
        "rope": model.rope.model_dump(),
        "max_length_tokens": config.data.max_length_tokens,  # decides how far RoPE is stretched
    }


def reference_file(config: RunConfig, pairs: PairSet) -> Path:
    """The file for this model and this (whole) tokenized set, there or not."""
    facts = json.dumps(reference_facts(config), sort_keys=True)
    of_model = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return Path(config.data.cache_dir).expanduser() / f"reference-{pairs.content[:16]}-{of_model}.npy"


def load_reference(config: RunConfig, pairs: PairSet) -> NDArray[np.float64]:
    """[pairs, 2] log-probabilities. Raises DataError where they are not there, or not all of them."""
    file = reference_file(config, pairs)
    how = "run `ds-longft data ref_logps ...` with the same run config"
    if not file.exists():
        raise DataError(
            f"dpo.reference is precomputed, but there are no log-probabilities of {config.model.path} for this data "
            f"(looked for {file}): {how}"
        )
    logps: NDArray[np.float64] = np.load(file)
    missing = int(np.isnan(logps).any(1).sum())
    if missing:
        raise DataError(f"{file} lacks {missing} of {len(logps)} pairs: {how}, it goes on where it stopped")
    return logps


def open_reference(config: RunConfig, pairs: PairSet) -> np.memmap[Any, np.dtype[np.float64]]:
    """The file, open for writing; made full of NaN where it is not there yet."""
    file = reference_file(config, pairs)
    if not file.exists():
        new = file.with_suffix(f".{os.getpid()}.tmp")
        with new.open("wb") as out:
            np.save(out, np.full((len(pairs), 2), np.nan))
        os.replace(new, file)
        file.with_suffix(".json").write_text(json.dumps(reference_facts(config), indent=1) + "\n")
    opened: np.memmap[Any, np.dtype[np.float64]] = np.lib.format.open_memmap(file, mode="r+")
    return opened
