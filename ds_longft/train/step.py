"""Forward, backward and optimizer of one step: the one place where the loss rule becomes a gradient.

L = sum(w * ce) / sum(w), both sums over every pack of the optimizer step, every accumulation micro-step, every sp and
dp rank. W = sum(w) is known from the data plan before the first backward pass: each rank backpropagates
local_sum * world / W, the engine averages over the world, and no differentiable collective is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ds_longft.batch import Pack
from ds_longft.layout import ParallelLayout


def loss_scale(total_weight: float, layout: ParallelLayout) -> float:
    """What a rank's loss sum is multiplied by before its backward pass: the engine then averages over the world.

    `total_weight`: sum of the loss weights of the whole step, over every pack and dp rank. A step without any target
    (0) backpropagates zeros.
    """
    return layout.world / total_weight if total_weight else 0.0


def backpropagate_pack(engine: Any, pack: Pack, scale: float, layout: ParallelLayout, device: torch.device) -> Tensor:
    """Forward and backward of one pack; returns this rank's sums, [1 + metrics], the loss first."""
    sums: Tensor = engine.module.backpropagate(engine, pack, scale, layout, device)
    return sums


@torch.no_grad()
def evaluate_pack(engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> tuple[Tensor, int]:
    """The same sums without a gradient, and this rank's share of the pack's targets."""
    targets = int((pack.loss_weights != 0).sum()) if layout.sp_rank == 0 else 0
    return engine.module.evaluate(engine, pack, layout, device), targets


def backpropagate(
    engine: Any, packs: Sequence[Pack], total_weight: float, layout: ParallelLayout, device: torch.device
) -> Tensor:
    """Forward and backward of this rank's packs of one step, one micro-step each; the weights do not change yet.

    Returns this rank's sum of the losses, a float64 scalar without gradient. The caller ends the step with
    `engine.step()`.
    """
    scale = loss_scale(total_weight, layout)
    total = torch.zeros((), dtype=torch.float64, device=device)
    engine.module.before_step(engine, packs, layout, device)
    for i, pack in enumerate(packs):
        if i:
            engine.step()  # counts the micro-step; weights change only at the last one
        total += backpropagate_pack(engine, pack, scale, layout, device)[0]
    return total


def apply_step(engine: Any, loss_total: float, *, skip: bool) -> tuple[str | None, float | None]:
    """Let the optimizer take its step, unless loss or gradient is not finite: what is not, and the gradient's norm.

    With `skip` the engine is ready for the next step afterwards; without, it is left as it is. ZeRO and bf16
    optimizers refuse a gradient that is not finite by themselves, on all ranks alike. A plain one (stage 0 in float32)
    would take it, and is not asked.
    """
    finite = math.isfinite(loss_total)
    if not (finite or skip):
        return "the loss is not finite", None
    norm = _unwrapped_grad_norm(engine)
    if norm is not None and not math.isfinite(norm):
        engine.zero_grad()
        engine.micro_steps += 1  # what engine.step() would have counted
        refused = True
    else:
        engine.step()
        refused = not engine.was_step_applied()
    assert finite or refused, "a loss that is not finite must leave no finite gradient"
    if refused:
        return "the gradient is not finite" if finite else "the loss is not finite", None
    norm = engine.get_global_grad_norm() if norm is None else norm
    return None, None if norm is None else float(norm)


def _unwrapped_grad_norm(engine: Any) -> float | None:
    """Global gradient norm where no ZeRO wrapper computes one (stage 0 in fp32): each rank holds all gradients."""
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
