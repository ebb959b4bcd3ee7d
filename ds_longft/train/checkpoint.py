"""Checkpoints that are either complete or not there: room? -> temporary folder -> every rank ok -> manifest -> rename.

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from safetensors.torch import load_file, save_file

from ds_longft.errors import CheckpointError
from ds_longft.model.lora import WEIGHTS_NAME
from ds_longft.ranks.join import Agreement
from ds_longft.run_files import Manifest
from ds_longft.stored import Unreadable, read_file
from ds_longft.train.durable import as_readable_as_the_folder
from ds_longft.train.elastic import load_for_other_world, own_settings
from ds_longft.train.resume_rules import OtherVersion, TrainState, read_state

MANIFEST = "manifest.json"
STATE = "state.json"
ENGINE = "engine"
ROOM = 1.2  # times the size of the last checkpoint must be free before a save is begun
SET_ASIDE = "set-aside-"


class Checkpoints:
    """The checkpoints of one output folder. Every method is collective: all ranks call it alike."""

    def __init__(self, folder: Path, agreement: Agreement, keep: int) -> None:
        self.folder, self.agreement, self.keep = folder, agreement, keep
        self._last_bytes = 0  # of the newest checkpoint

    def save(self, engine: Any, state: TrainState, write_model: Callable[[Path], None]) -> Path:
        """Write checkpoint-<step> and delete the oldest beyond `keep`.

        `write_model` is called on every rank with the folder and writes the model in its public format (rank 0 writes,
        all ranks gather).

        Raises:
            CheckpointError: on every rank, when there is no room or any rank could not write; nothing half-written is
                left, and older checkpoints are as they were.
        """
        final = self.folder / f"checkpoint-{state.step}"
        tmp = self.folder / f".tmp-checkpoint-{state.step}"
        what = f"checkpoint-{state.step} could not be written"

        def prepare() -> None:
            self._check_room()
            shutil.rmtree(tmp, ignore_errors=True)
            (tmp / ENGINE).mkdir(parents=True)

        self._all_ok(what, tmp, prepare if self.agreement.rank == 0 else None)
        writer = _Writer.put_into(engine)

        def write() -> None:
            engine.save_checkpoint(str(tmp), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
            if writer.error is not None:
                raise writer.error
            save_file(rng_state(), tmp / f"rng-{self.agreement.rank:05d}.safetensors")
            if self.agreement.rank == 0:
                (tmp / STATE).write_text(json.dumps(asdict(state), indent=1))

        self._all_ok(what, tmp, write)
        self._all_ok(what, tmp, lambda: write_model(tmp))
        manifest: dict[str, Any] = {}
        for part in self._all_ok(what, tmp, lambda: self._seal_share(tmp)):
            manifest |= part

        def commit() -> None:
            as_readable_as_the_folder(tmp)
            _write_durably(tmp / MANIFEST, json.dumps({"step": state.step, "files": manifest}, indent=1))
            for folder in [p for p in tmp.rglob("*") if p.is_dir()] + [tmp]:
                _fsync_folder(folder)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(tmp, final)
            _fsync_folder(self.folder)

        self._all_ok(what, tmp, commit if self.agreement.rank == 0 else None)
        self._last_bytes = sum(entry["bytes"] for entry in manifest.values())
        if self.agreement.rank == 0:
            for old in self._found()[self.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def find(self, resume: str | int) -> tuple[Path, TrainState] | None:
        """The checkpoint to continue from: the newest valid one, or exactly the step asked for; None for a fresh start.

        Saves that were cut short are removed. The caller holds the folder's lock.

        Raises:
            CheckpointError: the step asked for is missing or damaged, or there are checkpoints and none is valid.
        """
        if self.agreement.rank == 0:
            for pattern in (".tmp-checkpoint-*", ".universal-checkpoint-*"):
                for cut_short in self.folder.glob(pattern):
                    shutil.rmtree(cut_short, ignore_errors=True)
        if resume == "never":
            return None
        found = self.agreement.broadcast(self._found())
        if isinstance(resume, int):
            found = [p for p in found if p.name == f"checkpoint-{resume}"]
            if not found:
                raise CheckpointError(
                    f"train.resume asks for step {resume}, but {self.folder} holds no checkpoint-{resume}"
                )
        rejected, others = [], []
        for path in found:
            found_out = self.agreement.gather(self._damage(path))
            problems = [problem for problem, _ in found_out if problem]
            if not problems:
                state = read_state(path / STATE)
                self._last_bytes = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
                return path, state
            rejected.append(f"{path.name}: {problems[0]}")
            whole = all(other for problem, other in found_out if problem)
            others += [path] if whole else []
            if self.agreement.rank == 0:
                print(f"{path.name} is {'' if whole else 'damaged and '}passed over: {problems[0]}", flush=True)
        if rejected:
            raise CheckpointError(
                f"no checkpoint of {self.folder} can be continued ({'; '.join(rejected)}). {_ways_out(others)}"
            )
        return None

    def set_aside_after(self, step: int) -> list[str]:
        """Rename checkpoints of later steps, which this run is about to make again. Returns their new names.

        Left in place they would be taken for the newest ones: the next resume would jump to them, and retention would
        keep them instead of this run's own.
        """

        def work() -> list[str]:
            names = []
            for path in self._found():
                if int(path.name.split("-")[1]) > step:
                    aside = path.with_name(SET_ASIDE + path.name)
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(path, aside)
                    names.append(aside.name)
            return names

        return self.agreement.on_rank0(work)

    def load(self, engine: Any, path: Path, state: TrainState) -> None:
        """Weights, optimizer and this rank's random state from `path` into the engine.

        Where another number of ranks wrote it, everything but the random state. Frozen weights are not in it (they
        came from the base model), hence the lenient module load.
        """
        if state.world != self.agreement.world:
            load_for_other_world(engine, path, ENGINE, self.agreement)
            return
        with own_settings(engine):
            loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE, load_module_strict=False)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {path}/{ENGINE}")
        set_rng_state(load_file(path / f"rng-{self.agreement.rank:05d}.safetensors"))

    def _found(self) -> list[Path]:
        """Complete checkpoint folders, newest first."""
        if not self.folder.is_dir():
            return []
        steps = {p: re.fullmatch(r"checkpoint-(\d+)", p.name) for p in self.folder.iterdir()}
        return sorted((p for p, m in steps.items() if m), key=lambda p: -int(p.name.split("-")[1]))

    def _check_room(self) -> None:
        """Raise OSError where another checkpoint of the last one's size would hardly fit."""
        free = shutil.disk_usage(self.folder).free
        if free < ROOM * self._last_bytes:
            raise OSError(
                f"{self.folder} has {free / 2**30:.2f} GiB free, a checkpoint takes {self._last_bytes / 2**30:.2f} GiB"
            )

    def _seal_share(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every world-th file, each forced to the disk: ranks share the reading."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())[self.agreement.rank :: self.agreement.world]
        sealed = {}
        for path in files:
            with open(path, "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
                os.fsync(f.fileno())
                sealed[str(path.relative_to(folder))] = {"bytes": f.tell(), "sha256": digest}
        return sealed

    def _damage(self, folder: Path) -> tuple[str | None, bool]:
        """What is wrong with this rank's share of the files, None if nothing is; whether it is only the version."""
        if damage := self._damaged_file(folder):
            return damage, False
        try:
            read_state(folder / STATE)
        except OtherVersion as e:
            return str(e), True
        except Unreadable as e:
            return str(e), False
        return None, False

    def _damaged_file(self, folder: Path) -> str | None:
        try:
            files = read_file(folder / MANIFEST, Manifest).files
        except Unreadable as e:
            return str(e)
        for name in sorted(files)[self.agreement.rank :: self.agreement.world]:
            path, expected = folder / name, files[name]
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected.bytes:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {expected.bytes}"
            if _sha256(path) != expected.sha256:
                return f"{name} has changed since it was written (sha256)"
        # DeepSpeed unpickles what it finds there: nothing that we did not write.
        foreign = sorted({str(p.relative_to(folder)) for p in (folder / ENGINE).rglob("*") if p.is_file()} - set(files))
        return f"{foreign[0]} is not in {MANIFEST}" if foreign else None

    def _all_ok(self, what: str, tmp: Path, work: Callable[[], Any] | None) -> list[Any]:
        """Do `work`, and learn whether every rank could do its own: every rank's result, or CheckpointError on all."""
        result = error = None
        try:
            result = work() if work is not None else None
        except Exception as e:  # whatever keeps a file from being written must not leave the other ranks waiting
            error = f"{type(e).__name__}: {e}"
        outcomes = self.agreement.gather((result, error))
        errors = [f"rank {r}: {e}" for r, (_, e) in enumerate(outcomes) if e]
        if errors:
            if self.agreement.rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)
            raise CheckpointError(f"{what}: {'; '.join(errors)}")
        return [value for value, _ in outcomes]


class _Writer(TorchCheckpointEngine):
    """DeepSpeed's own writer of shards, but an error waits until all ranks are past DeepSpeed's barriers.

    Raised at once it would leave the others in the barrier behind the write until the process group times out.
    """

    error: Exception | None = None

    @classmethod
    def put_into(cls, engine: Any) -> _Writer:
        """Take the place of the engine's writer, with its settings."""
        writer = cls.__new__(cls)
        writer.__dict__.update(engine.checkpoint_engine.__dict__)
        writer.error = None
        engine.checkpoint_engine = writer
        engine._copy_recovery_script = lambda path: None  # an unguarded copy of a script that cannot read our folders
        return writer

    def save(self, state_dict: Any, path: str) -> None:
        """Write one shard."""
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as e:  # torch reports a full disk as RuntimeError
            self.error = e


def _ways_out(of_other_versions: list[Path]) -> str:
    """What can be done where no checkpoint can be continued."""
    ways = []
    if of_other_versions:
        ways.append("The version that wrote a checkpoint goes on from it exactly.")
    if adapters := [path for path in of_other_versions if (path / WEIGHTS_NAME).is_file()]:
        ways.append(
            f"The weights alone, with a new optimizer and schedule: set lora.init_from to {adapters[0]}, and give a "
            "new output_dir."
        )
    return " ".join([*ways, "To start over, remove them, or set train.resume to never."])


def rng_state() -> dict[str, torch.Tensor]:
    """This rank's random state (dropout draws from it)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Go on drawing from where `rng_state` stood."""
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
