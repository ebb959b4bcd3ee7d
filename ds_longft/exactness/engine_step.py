"""One optimizer step of a live engine without its effect: loss and gradients are taken, the weights stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_longft.batch import Pack
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.objective import Objective

Backpropagate = Callable[[Any, Sequence[Pack], float, ParallelLayout, torch.device], Tensor]
"""The training loop's own forward and backward of one step: `train.step.backpropagate`."""


@dataclass(frozen=True)
class Gradients:
    """Loss of a step and, on rank 0 alone, the whole gradient of every trained parameter in float32 on the CPU."""

    loss: float
    grads: dict[str, Tensor]

    @property
    def norm(self) -> float:
        """Norm of all gradients together; 0.0 on ranks other than 0."""
        return sum(float(g.double().square().sum()) for g in self.grads.values()) ** 0.5


@contextmanager
def weights_held(engine: Any) -> Iterator[None]:
    """Inside, `engine.step()` does all it does but change weights and optimizer state; counters are put back after."""
    inner = engine.optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    names = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
    counters = {name: getattr(engine, name) for name in names}
    inner.step = lambda *_, **__: None
    try:
        yield
    finally:
        del inner.step  # the class's own again
        engine.set_gradient_accumulation_boundary(None)
        for name, value in counters.items():
            setattr(engine, name, value)


def step_gradients(
    engine: Any,
    backpropagate: Backpropagate,
    packs: Sequence[Pack],
    total_weight: float,
    layout: ParallelLayout,
    device: torch.device,
) -> Gradients:
    """Run one step of `packs` (this dp rank's) split by `layout`, which may differ from the run's own. Collective.

    Call it inside `weights_held`. The loss is what the run would log.
    """
    objective: Objective = engine.module
    usual = objective.layout, objective.reference
    objective.layout = layout
    if objective.reference == "precomputed":
        # Those log-probabilities belong to whole answers, and packs here are cut. The reference is the model without
        # adapters, in full fine-tuning the model itself (nothing is trained yet).
        objective.reference = "adapter_off"
    accumulation = _Accumulation(engine, len(packs))
    try:
        loss_sum = backpropagate(accumulation, packs, total_weight, layout, device)
        dist.all_reduce(loss_sum)
        grads = _whole_gradients(objective.model)
        engine.step()  # lets go of the gradients
    finally:
        objective.layout, objective.reference = usual
    return Gradients(float(loss_sum) / total_weight if total_weight else 0.0, grads)


class _Accumulation:
    """The engine with another number of micro-steps than its config names."""

    def __init__(self, engine: Any, micro_steps: int) -> None:
        self.engine, self.left = engine, micro_steps
        engine.set_gradient_accumulation_boundary(self.left == 1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> None:
        self.engine.step()
        self.left -= 1
        self.engine.set_gradient_accumulation_boundary(self.left == 1)


def _whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter's gradient as the optimizer would see it. All ranks take part, rank 0 keeps them."""
    from deepspeed.utils import safe_get_full_grad

    kept = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        grad = safe_get_full_grad(p)
        if dist.get_rank() == 0:
            shape = getattr(p, "ds_shape", p.shape)
            kept[name] = torch.zeros(shape) if grad is None else grad.detach().to("cpu", torch.float32, copy=True)
    return kept
