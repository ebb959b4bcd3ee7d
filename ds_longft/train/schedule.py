"""Learning rate as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from ds_longft.config.train_keys import OptimConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0-based) out of `total_steps`.

    Linear warmup from peak / warmup_steps, then the schedule down to `min_lr_ratio` of the peak at the last step.
    """
    warmup = optim.warmup_steps if optim.warmup_steps is not None else math.ceil(optim.warmup_ratio * total_steps)
    peak = optim.learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if optim.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    shape = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return peak * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape)
