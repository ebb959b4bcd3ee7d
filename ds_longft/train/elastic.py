"""A checkpoint for another number of ranks than wrote it: DeepSpeed's universal form, where every parameter is whole.

ZeRO cuts optimizer and weights into as many parts as there are ranks, and DeepSpeed refuses to load them on another
number. Its converter joins the parts; the engine then cuts them anew. Exact in weights, moments and data; only dropout
draws differ.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ds_longft.errors import CheckpointError
from ds_longft.ranks.join import Agreement
from ds_longft.train.make_optimizer import COUNTED, inner

OF_ONE_WORLD = ("AdamW8bit", "MuonWithAuxAdam")
"""Their state under ZeRO is not as long as the weights it belongs to: scales of 256 numbers, whole matrices."""


def load_for_other_world(engine: Any, path: Path, tag: str, agreement: Agreement) -> None:
    """Load the engine's part of checkpoint `path`, written by another number of ranks.

    Rank 0 writes the joined form beside the checkpoint (its size once more) and deletes it afterwards.

    Raises:
        CheckpointError: DeepSpeed's converter or loader cannot do it.
    """
    if engine.zero_optimization_stage() == 0:  # nothing is cut
        with own_settings(engine):
            engine.load_checkpoint(str(path), tag=tag, load_module_strict=False)
        return
    if type(inner(engine)).__name__ in OF_ONE_WORLD:
        raise CheckpointError(
            f"{path} was written by another number of ranks, and under ZeRO the state of adamw_8bit and muon "
            "(optim.type) cannot be cut anew: start as many ranks as wrote it, or set train.resume to never."
        )
    joined = path.parent / f".universal-{path.name}"
    agreement.on_rank0(lambda: _join(path / tag, joined / tag))
    try:
        engine._config.load_universal_checkpoint = True
        with own_settings(engine):
            loaded, _ = engine.load_checkpoint(str(joined), tag=tag, load_module_strict=False)
    finally:
        engine._config.load_universal_checkpoint = False
        agreement.gather(None)
        if agreement.rank == 0:
            shutil.rmtree(joined, ignore_errors=True)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in the universal form of {path}")
    # DeepSpeed 0.19.8 hands one counter of steps to all groups, which each of them then counts up.
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@contextlib.contextmanager
def own_settings(engine: Any) -> Iterator[None]:
    """Keep what this start says about decay, betas, epsilon and clipping, whatever a load brings with it.

    DeepSpeed 0.19.8 restores them from the checkpoint: the config would name values that are not in force. Of a
    universal one it hands the first group's to all, and norms would be decayed like matrices.
    """
    counted = {"params", *COUNTED}
    settings = [{k: v for k, v in group.items() if k not in counted} for group in engine.optimizer.param_groups]
    clip = getattr(engine.optimizer, "clip_grad", None)
    yield
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    if clip is not None:
        engine.optimizer.clip_grad = clip


def _join(source: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    said = io.StringIO()
    options = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(options)
    except Exception as e:  # whatever it trips over, the other ranks are waiting
        raise CheckpointError(
            f"{source.parent} was written by another number of ranks, and DeepSpeed's converter cannot join its parts "
            f"({type(e).__name__}: {e}). Start as many ranks as wrote it, or set train.resume to never."
        ) from e
