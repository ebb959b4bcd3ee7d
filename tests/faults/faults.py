"""Faults, put into a rank's own process by replacing functions of the product: what happens, where, at which step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def put_in(fault: dict[str, Any]) -> None:
    """`fault`: {"point": where, "step": after how many steps (of this process or of the run), "do": what}."""
    if "leaves_first" in fault:
        _leaves_first(Path(fault["leaves_first"]))
    if "point" in fault:
        globals()[f"_at_{fault['point']}"](fault)


def _leaves_first(report: Path) -> None:
    """A hanging rank ends as soon as the other one's `report` is there, while that one still waits for reports."""
    from types import SimpleNamespace

    from ds_longft.train import health

    def until_reported(_: float) -> None:
        while not (report.exists() and report.stat().st_size):
            time.sleep(0.01)

    health.time = SimpleNamespace(sleep=until_reported, monotonic=time.monotonic)  # type: ignore[attr-defined]


def _act(fault: dict[str, Any]) -> Any:
    what = fault["do"]
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "loop":
        while True:
            pass
    elif what == "sleep":
        time.sleep(fault["seconds"])
    elif what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
        time.sleep(0.05)  # a thread of the product takes note of it
    elif what == "raise":
        raise OSError(28, "No space left on device")
    elif what == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 1 has a total ...")
    else:
        raise AssertionError(what)
    return None


def _before(owner: Any, name: str, when: Callable[..., bool], fault: dict[str, Any]) -> None:
    """Do the fault before calls of `owner.name` for which `when(*args)` holds."""
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            _act(fault)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def _at_step(fault: dict[str, Any]) -> None:
    """In the middle of training step `step`, between forward and backward of its last pack."""
    from ds_longft.train.trainer import Trainer

    _before(Trainer, "_flops", lambda self, pack: self.state.step + 1 == fault["step"], fault)


def _at_update(fault: dict[str, Any]) -> None:
    """After the backward passes of step `step`, before its sums."""
    from ds_longft.train import trainer
    from ds_longft.train.trainer import Trainer

    holder: list[Any] = []
    original = Trainer._train_step

    def train_step(self: Any, step: Any) -> bool:
        holder[:] = [self.state.step + 1]
        return original(self, step)

    Trainer._train_step = train_step  # type: ignore[method-assign]
    _before(trainer, "apply_step", lambda *_: holder == [fault["step"]], fault)


def _at_side(fault: dict[str, Any]) -> None:
    """In two passes over pairs: in training step `step`, the chosen documents behind it and the rejected ones ahead."""
    from contextlib import contextmanager

    from ds_longft.objectives import passes as pairs
    from ds_longft.train.trainer import Trainer

    holder: list[int] = []
    original, of_a_step = pairs._two_backwards, Trainer._train_step

    def train_step(self: Any, step: Any) -> bool:
        holder[:] = [self.state.step + 1]
        return of_a_step(self, step)

    @contextmanager
    def two_backwards(engine: Any) -> Any:
        with original(engine) as boundary:

            def before(side: int) -> None:
                if side == 1 and holder == [fault["step"]]:
                    _act(fault)
                boundary(side)

            yield before

    Trainer._train_step = train_step  # type: ignore[method-assign]
    pairs._two_backwards = two_backwards


def _at_disk(fault: dict[str, Any]) -> None:
    """In a thread, at the read or write of a chunk `count`."""
    from itertools import count

    from ds_longft.sequence import disk

    calls = count(1)
    _before(disk, "_whole", lambda *_: next(calls) == fault["count"], fault)


def _at_start(fault: dict[str, Any]) -> None:
    """After everything is loaded, before the first step."""
    from ds_longft.train.trainer import Trainer

    _before(Trainer, "run", lambda self: True, fault)


def _at_eval(fault: dict[str, Any]) -> None:
    """During the evaluation after step `step`."""
    from ds_longft.train import trainer

    holder: list[Any] = []
    _remember = trainer.Trainer._evaluate

    def evaluate(self: Any) -> None:
        holder[:] = [self.state.step]
        _remember(self)
        holder.clear()

    trainer.Trainer._evaluate = evaluate  # type: ignore[method-assign]
    _before(trainer, "evaluate_pack", lambda *_: bool(holder) and holder[0] == fault["step"], fault)


def _at_save_prepare(fault: dict[str, Any]) -> None:
    """Before anything of checkpoint `step` is written."""
    from ds_longft.train.checkpoint import Checkpoints

    _before(Checkpoints, "save", lambda self, engine, state, write: state.step == fault["step"], fault)


def _at_save_shard(fault: dict[str, Any]) -> None:
    """In the middle of a shard: half of a file's bytes are there."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    original = TorchCheckpointEngine.save

    def save(self: Any, state_dict: Any, path: str) -> None:
        original(self, state_dict, path)
        if f".tmp-checkpoint-{fault['step']}/" in path:
            os.truncate(path, os.path.getsize(path) // 2)
            _act(fault)

    TorchCheckpointEngine.save = save


def _at_save_seal(fault: dict[str, Any]) -> None:
    """After the shards, before the checksums."""
    from ds_longft.train.checkpoint import Checkpoints

    _before(Checkpoints, "_seal_share", lambda self, folder: folder.name.endswith(f"-{fault['step']}"), fault)


def _at_save_rename(fault: dict[str, Any]) -> None:
    """After the manifest, before the rename (rank 0 does that)."""
    _before(os, "rename", lambda old, new: str(old).endswith(f".tmp-checkpoint-{fault['step']}"), fault)


def _at_save_done(fault: dict[str, Any]) -> None:
    """After the rename, before old checkpoints are deleted (rank 0 does that)."""
    from ds_longft.train.checkpoint import Checkpoints

    _before(Checkpoints, "_found", lambda self: (self.folder / f"checkpoint-{fault['step']}").exists(), fault)


def _at_load(fault: dict[str, Any]) -> None:
    """While a checkpoint is loaded."""
    from ds_longft.train.checkpoint import Checkpoints

    _before(Checkpoints, "load", lambda *_: True, fault)


def _at_every_step(fault: dict[str, Any]) -> None:
    """Before each step: slows a run down, so that a signal from outside hits it in the middle."""
    from ds_longft.train.trainer import Trainer

    _before(Trainer, "_train_step", lambda *_: True, fault)


def _at_write_limit(fault: dict[str, Any]) -> None:
    """From the save of `step` on the kernel refuses to let a file grow over `bytes`, for one save or for good."""
    import resource

    from ds_longft.train.checkpoint import Checkpoints

    original = Checkpoints.save

    def save(self: Any, engine: Any, state: Any, write_model: Any) -> Path:
        hit = state.step == fault["step"] or (fault.get("for_good") and state.step >= fault["step"])
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if hit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], hard))
        try:
            return original(self, engine, state, write_model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    Checkpoints.save = save  # type: ignore[method-assign]


def _at_no_room(fault: dict[str, Any]) -> None:
    """The disk has no room from the save of `step` on."""
    import shutil

    from ds_longft.train import checkpoint

    state = {"saves": 0}
    original = checkpoint.Checkpoints.save

    def save(self: Any, engine: Any, run_state: Any, write_model: Any) -> Path:
        state["saves"] = run_state.step
        return original(self, engine, run_state, write_model)

    checkpoint.Checkpoints.save = save  # type: ignore[method-assign]
    real = shutil.disk_usage
    usage = type(real("/"))
    shutil.disk_usage = lambda path: usage(10**9, 10**9, 0) if state["saves"] == fault["step"] else real(path)


def _at_poison(fault: dict[str, Any]) -> None:
    """The loss of this rank, or only its gradient, is NaN in step `step` (and in as many after it as `steps` says)."""
    import torch

    from ds_longft.train import trainer

    original = trainer.backpropagate_pack
    holder: list[Any] = []
    _before_step = trainer.Trainer._train_step

    def train_step(self: Any, step: Any) -> bool:
        holder[:] = [self]
        return _before_step(self, step)

    def poisoned(engine: Any, pack: Any, scale: float, layout: Any, device: Any) -> Any:
        step = holder[0].state.step + 1
        if not fault["step"] <= step < fault["step"] + fault.get("steps", 1):
            return original(engine, pack, scale, layout, device)
        if fault["what"] == "gradient":
            return original(engine, pack, fault.get("value", float("nan")), layout, device)
        handle = engine.module.register_forward_hook(lambda m, i, out: out * torch.tensor(float("nan")))
        try:
            return original(engine, pack, scale, layout, device)
        finally:
            handle.remove()

    trainer.Trainer._train_step = train_step  # type: ignore[method-assign]
    trainer.backpropagate_pack = poisoned


def _at_dead_tracker(fault: dict[str, Any]) -> None:
    """The tracker cannot be reached (`when`: init or log)."""
    import sys
    import types

    class Dead:
        id = "abc"

        def define_metric(self, *_: Any, **__: Any) -> None:
            pass

        def log(self, *_: Any, **__: Any) -> None:
            raise ConnectionError("tracker is down")

        def finish(self) -> None:
            raise ConnectionError("tracker is down")

    def init(**_: Any) -> Dead:
        if fault["when"] == "init":
            raise ConnectionError("tracker is down")
        return Dead()

    fake = types.SimpleNamespace(init=init, Settings=lambda **_: None, login=lambda **_: True)
    sys.modules["wandb"] = fake  # type: ignore[assignment]
