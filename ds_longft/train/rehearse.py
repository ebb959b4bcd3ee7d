"""The dry run before the first step: how much memory do steps take, and what may be kept with the rest?

A step's memory is that of the third step and of every later one. Much of it appears only after a first step: the
optimizer's moments, and under ZeRO-3 the gathered weights that stay. So one whole step of a few tokens comes first,
optimizer included (`settle`), and only then the longest pack is measured.

Nothing of it is left behind: gradients are zero (the loss is multiplied by zero), the learning rate is zero, the
optimizer's state is cleared, and counters and random state are put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ds_longft.batch import Pack
from ds_longft.data.pack import filler_pack
from ds_longft.decide.setting import GIB
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.relief import Relief
from ds_longft.train.device_memory import DeviceMemory
from ds_longft.train.install import Recompute
from ds_longft.train.make_optimizer import forget_steps, inner
from ds_longft.train.step import apply_step, backpropagate_pack

SHORT_TOKENS = 8
"""Tokens of each rank in the packs that only make what lasts beyond a step."""


def settle(engine: Any, layout: ParallelLayout, device: torch.device) -> None:
    """One dry step of short packs: afterwards everything is there that lasts beyond a step. Collective."""
    short = filler_pack(SHORT_TOKENS * layout.sp)
    dry_step(engine, [short] * engine.gradient_accumulation_steps(), layout, device)


def dry_pass(engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> None:
    """Forward and backward of a pack with a gradient of zero. Random numbers are drawn as if it had not been.

    Dropout would otherwise draw other masks after a resume than in a run that was not stopped.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        backpropagate_pack(engine, pack, 0.0, layout, device)


def dry_step(engine: Any, packs: Sequence[Pack], layout: ParallelLayout, device: torch.device) -> None:
    """One optimizer step that changes nothing, of this rank's packs, one for each accumulation micro-step. Collective.

    Only for an engine that has not been trained or loaded: the optimizer's state is cleared.
    """
    with _undone(engine):
        for i, pack in enumerate(packs):
            if i:
                engine.step()  # counts the micro-step
            dry_pass(engine, pack, layout, device)
        if not getattr(engine.optimizer, "swap_optimizer", False):  # states on NVMe: they take no GPU memory
            apply_step(engine, 0.0, skip=True)


@contextmanager
def _undone(engine: Any) -> Iterator[None]:
    """Steps inside change no weight and are not counted."""
    counted = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
    counters = {name: getattr(engine, name) for name in counted}
    optimizer = inner(engine)
    groups = [(group, {key: group[key] for key in ("lr", "weight_decay")}) for group in optimizer.param_groups]
    for group, _ in groups:
        group.update(lr=0.0, weight_decay=0.0)
    try:
        yield
    finally:
        for group, values in groups:
            group.update(values)
        forget_steps(optimizer)
        for name, value in counters.items():
            setattr(engine, name, value)


def rehearse(
    engine: Any,
    recompute: Recompute,
    pack: Pack,
    layout: ParallelLayout,
    device: torch.device,
    memory: DeviceMemory | None,
) -> str | None:
    """Where memory can be told: one dry step on the longest pack; with `auto`, then keep what the memory left allows.

    Call `settle` before. What does not fit is found before the first step and not hours into a run. Collective.
    Returns a line for the reader, None without `memory`.
    """
    if memory is None:
        return None
    memory.reset_peak()
    with Relief([], 0, device):  # as steps will run: autograd adds out of place under any such mode
        dry_step(engine, _as_last(engine, pack, layout), layout, device)
    free = _least(memory.free(), device)
    peak = memory.peak()
    if recompute.policy != "auto":
        return f"recomputation {recompute.policy}: longest pack ({pack.tokens:,} tokens) peaks at {peak / GIB:.1f} GiB"
    size = torch.finfo(next(engine.module.parameters()).dtype).bits // 8
    on_device, on_host = recompute.keep_linears(free, engine.module.tokens_at_once(pack) // layout.sp, size, device)
    memory.release()
    kept = sum(len(k.on_device) + len(k.on_host) for k in recompute.keep)
    return (
        f"longest pack ({pack.tokens:,} tokens) peaks at {peak / GIB:.1f} GiB; {on_device / GIB:.1f} GiB more "
        f"on the GPU and {on_host / GIB:.1f} GiB on the host keep the outputs of {kept} of "
        f"{sum(map(len, recompute.groups))} groups of linears"
    )


def choose_passes(
    engine: Any, wanted: str, pack: Pack, layout: ParallelLayout, device: torch.device, memory: DeviceMemory | None
) -> str | None:
    """`dpo.passes: auto`: the plan's choice, and where that is one pass, whether the longest pack fits so. Collective;
    a line, None if nothing was open. Call `settle` before.

    The plan (`decide/decisions.py`) has put its choice into the objective: one pass where it is predicted to fit
    and two are not faster for what they leave free. Measured in two passes, which need less: one pass holds the
    activations of both sides at once, so it takes at most twice what two passes took beyond the memory that was in use
    before. Nothing can run out of memory by trying.
    """
    objective = engine.module
    if wanted != "auto" or memory is None:
        return None
    if objective.passes == "two":
        return "dpo.passes auto: two, as `ds-longft plan` predicts"
    objective.passes = "two"
    memory.reset_peak()
    before = memory.now()
    dry_step(engine, _as_last(engine, pack, layout), layout, device)
    used = memory.peak() - before
    spare = _least(memory.free() - used, device)
    memory.release()
    if spare >= 0:
        objective.passes = "one"
    return (
        f"dpo.passes auto: {objective.passes}; in two passes the longest pack ({pack.tokens:,} tokens) took "
        f"{used / GIB:.1f} GiB beyond the weights, both answers at once would leave {spare / GIB:.1f} GiB"
    )


def _as_last(engine: Any, pack: Pack, layout: ParallelLayout) -> list[Pack]:
    """The packs of a step that ends with `pack`: the gradients of those before it are in memory then."""
    return [filler_pack(SHORT_TOKENS * layout.sp)] * (engine.gradient_accumulation_steps() - 1) + [pack]


def _least(size: int, device: torch.device) -> int:
    """The smallest of all ranks' sizes."""
    box = torch.tensor(size, device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MIN)
    return int(box)
