"""Checkpoints that are either complete or not there: temporary folder -> every rank ok -> manifest -> rename.

DeepSpeed writes its `latest` file while other ranks may still be writing and never renames, so a killed save can be
resumed from; here the folder gets its name only when all of it is on disk, and a resume takes the newest folder whose
files match its manifest.

    checkpoint-120/
      engine/            DeepSpeed's shards: trainable weights, optimizer (frozen weights are left out)
      adapter_*.json...  the same weights in PEFT's format (LoRA runs)
      rng-00000.safetensors   one per rank
      state.json         counters, cursor, fingerprints
      manifest.json      every file with size and sha256
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ds_longft.errors import CheckpointError
from ds_longft.train.ranks import Agreement

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TrainState:
    """Where the run stands after `step` optimizer steps, and what it may be continued with."""

    step: int
    epoch: int
    step_in_epoch: int  # of the next step
    tokens_seen: int
    total_steps: int
    world: int
    fingerprint: str  # of the data and everything that decides its order
    trained: str  # of the trainable parameters' names and shapes
    wandb_id: str | None = None


class Checkpoints:
    """The checkpoints of one output folder. Every method is collective: all ranks call it alike."""

    def __init__(self, folder: Path, agreement: Agreement, keep: int) -> None:
        self.folder, self.agreement, self.keep = folder, agreement, keep

    def save(self, engine: Any, state: TrainState, write_model: Callable[[Path], None]) -> Path:
        """Write checkpoint-<step> and delete the oldest beyond `keep`.

        `write_model` is called on every rank with the folder and writes the model in its public format (rank 0 writes,
        all ranks gather).

        Raises:
            CheckpointError: on every rank, when any rank could not write; nothing half-written stays behind.
        """
        final = self.folder / f"checkpoint-{state.step}"
        tmp = self.folder / f".tmp-checkpoint-{state.step}"
        if self.agreement.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        self.agreement.gather(None)
        error = None
        try:
            engine.save_checkpoint(str(tmp), tag="engine", save_latest=False, exclude_frozen_parameters=True)
            write_model(tmp)
            save_file(_rng_state(), tmp / f"rng-{self.agreement.rank:05d}.safetensors")
            if self.agreement.rank == 0:
                (tmp / "state.json").write_text(json.dumps(asdict(state), indent=1))
        except OSError as e:
            error = str(e)
        self._raise_together(error, tmp, f"checkpoint-{state.step} could not be written")
        manifest = {
            name: entry for part in self.agreement.gather(self._hash_share(tmp)) for name, entry in part.items()
        }
        if self.agreement.rank == 0:
            _write_durably(tmp / MANIFEST, json.dumps({"step": state.step, "files": manifest}, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(tmp, final)
            _fsync_folder(self.folder)
            for old in self._found()[self.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        self.agreement.gather(None)
        return final

    def find(self, resume: str | int) -> tuple[Path, TrainState] | None:
        """The checkpoint to continue from: the newest valid one, or exactly the step asked for; None for a fresh start.

        Raises:
            CheckpointError: the step asked for is missing or damaged, or there are checkpoints and none is valid.
        """
        if resume == "never":
            return None
        found = self.agreement.broadcast(self._found())
        if isinstance(resume, int):
            found = [p for p in found if p.name == f"checkpoint-{resume}"]
            if not found:
                raise CheckpointError(
                    f"train.resume asks for step {resume}, but {self.folder} holds no checkpoint-{resume}"
                )
        rejected = []
        for path in found:
            problems = [p for p in self.agreement.gather(self._damage(path)) if p]
            if not problems:
                return path, TrainState(**json.loads((path / "state.json").read_text()))
            rejected.append(f"{path.name}: {problems[0]}")
            if self.agreement.rank == 0:
                print(f"{path.name} is damaged and passed over: {problems[0]}", flush=True)
        if rejected:
            raise CheckpointError(
                f"no checkpoint of {self.folder} is valid ({'; '.join(rejected)}). "
                "Remove them, or set train.resume to never, to start over."
            )
        return None

    def load(self, engine: Any, path: Path) -> None:
        """Weights, optimizer and this rank's random state from `path` into the engine.

        Frozen weights are not in it (they came from the base model), hence the lenient module load.
        """
        loaded, _ = engine.load_checkpoint(str(path), tag="engine", load_module_strict=False)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {path}/engine")
        _set_rng_state(load_file(path / f"rng-{self.agreement.rank:05d}.safetensors"))

    def check_same_run(self, path: Path, state: TrainState, *, world: int, fingerprint: str, trained: str) -> None:
        """Refuse to continue a run whose data, trained weights or number of ranks changed.

        Raises:
            CheckpointError: lists everything that changed.
        """
        changed = []
        if state.world != world:
            changed.append(f"it was written by {state.world} ranks and this run has {world}: start as many")
        if state.fingerprint != fingerprint:
            changed.append(
                "the data, its order or the batch layout (data.*, seed, gradient_accumulation_steps, dp) changed"
            )
        if state.trained != trained:
            changed.append("the trained parameters (lora.*, model.path) changed")
        if changed:
            raise CheckpointError(
                f"{path} cannot be continued exactly: {'; '.join(changed)}. "
                "Undo the change, or give a new output_dir, or set train.resume to never."
            )

    def _found(self) -> list[Path]:
        """Complete checkpoint folders, newest first."""
        if not self.folder.is_dir():
            return []
        steps = {p: re.fullmatch(r"checkpoint-(\d+)", p.name) for p in self.folder.iterdir()}
        return sorted((p for p, m in steps.items() if m), key=lambda p: -int(p.name.split("-")[1]))

    def _hash_share(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every world-th file: ranks share the reading."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())[self.agreement.rank :: self.agreement.world]
        return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}

    def _damage(self, folder: Path) -> str | None:
        """What is wrong with this rank's share of the files; None if nothing is."""
        try:
            files = json.loads((folder / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError) as e:
            return f"{MANIFEST} cannot be read ({e})"
        for name in sorted(files)[self.agreement.rank :: self.agreement.world]:
            path, expected = folder / name, files[name]
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written (sha256)"
        return None

    def _raise_together(self, error: str | None, tmp: Path, what: str) -> None:
        errors = [f"rank {r}: {e}" for r, e in enumerate(self.agreement.gather(error)) if e]
        if errors:
            if self.agreement.rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)
            raise CheckpointError(f"{what}: {'; '.join(errors)}")


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
