"""The optimizer of a run: which weights it is given, and what its kinds need of the loop around them.

What each may be combined with is in `config/optimizers.py`. Learning rates are 0 until the trainer sets those of a
step: DeepSpeed steps some optimizers once while it builds the engine, and weights must not decay then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_longft.config.train_keys import OptimConfig

COUNTED: dict[str, float] = {"step": 0, "k": 0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}
"""What optimizers count in their parameter groups (Apex-like ones, schedule-free), and how it begins."""

MUON_MOMENTUM = 0.95  # DeepSpeed's own


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters, decayed and not: biases, norms and other vectors are never decayed."""
    return _by_decay([p for p in model.parameters() if p.requires_grad], weight_decay)


def make_optimizer(
    model: nn.Module, optim: OptimConfig, *, fused: bool, offloaded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of `optim.type` over the trainable parameters; its learning rate is set before each step.

    `fused`: the weights are on a GPU. `offloaded`: the optimizer's state is in host memory.
    """
    if optim.type == "muon":
        return _muon(model, optim, fused=fused)
    groups = param_groups(model, optim.weight_decay)
    moments: dict[str, Any] = {"lr": 0.0, "betas": optim.betas, "eps": optim.eps}
    if optim.type == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    made: torch.optim.Optimizer
    if optim.type == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        made = AdamW8bit(groups, **moments)
    elif optim.type == "adafactor":
        from transformers import Adafactor

        made = Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False)
    elif optim.type == "schedule_free":
        from schedulefree import AdamWScheduleFree

        made = AdamWScheduleFree(groups, **moments)
        for group in made.param_groups:  # as its train(), which would note a state for weights that ZeRO replaces
            group["train_mode"] = True
    elif fused and offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use; torch's own is 5-7x slower there

        made = DeepSpeedCPUAdam(groups, **moments)
    else:
        made = torch.optim.AdamW(groups, **moments, fused=fused)
    return made


def _muon(model: nn.Module, optim: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """DeepSpeed's Muon over matrices, adapters' too, and AdamW inside of it over all else: embeddings, the head, norms,
    stacked experts. By DeepSpeed's own rule (`deepspeed.set_optimizer_flags`), and the head whatever its name.
    """
    if not fused:  # DeepSpeed has torch compile it: a minute of C++ for nothing
        torch._dynamo.config.disable = True
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    ends = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    tokens = {id(p) for end in ends if end is not None for p in end.parameters()}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            named = any(word in name.lower() for word in ("embed", "lm_head"))
            p.use_muon = len(_shape(p)) == 2 and not named and id(p) not in tokens  # type: ignore[attr-defined]
            (matrices if p.use_muon else others).append(p)  # type: ignore[attr-defined]
    groups: list[dict[str, Any]] = []
    if matrices:
        decay = {"momentum": MUON_MOMENTUM, "weight_decay": optim.weight_decay}
        groups.append({"params": matrices, "use_muon": True, "lr": 0.0, "lr_share": 1.0, **decay})
    share = (optim.adam_learning_rate or 0.0) / optim.learning_rate
    adam = {"use_muon": False, "lr": 0.0, "lr_share": share, "betas": optim.betas, "eps": optim.eps}
    groups += [{**group, **adam} for group in _by_decay(others, optim.weight_decay)]
    made: torch.optim.Optimizer = MuonWithAuxAdam(groups)
    return made


def _by_decay(trained: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices, vectors = ([p for p in trained if (len(_shape(p)) >= 2) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def _shape(p: nn.Parameter) -> torch.Size:
    """Under ZeRO-3 a parameter is an empty shard; its full shape is ds_shape."""
    shape: torch.Size = getattr(p, "ds_shape", p.shape)
    return shape


def inner(engine: Any) -> Any:
    """The optimizer inside of ZeRO's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine: Any, lr: float) -> None:
    """That of the next step; groups with a share of their own get it (`_muon`)."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_share", 1.0)


def forget_steps(optimizer: Any) -> None:
    """Put an optimizer's state back to what it is before a first step, the memory of it kept.

    Right after steps with a learning rate of 0, which leave schedule-free's own weights ("z") as they were.
    """
    for group in optimizer.param_groups:
        group.update({key: value for key, value in COUNTED.items() if key in group})
    for state in optimizer.state.values():
        for key, value in state.items():
            if key == "momentum_buffer" and isinstance(optimizer, torch.optim.SGD):
                state[key] = None  # its first step takes the gradient as it is, without dampening
            elif key == "z" or key.startswith("qmap"):  # "qmap": bitsandbytes' table of the values of a byte
                continue
            elif isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, (int, float)):
                state[key] = 0


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Inside, the model has the weights to evaluate and to save. Collective.

    Schedule-free trains others than those: a point between their average, which is theirs, and the steps. What is
    trained is put aside and back, so that an evaluation changes no bit of it.
    """
    optimizer = inner(engine)
    if not any("train_mode" in group for group in optimizer.param_groups):
        yield
        return
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    aside = [p.detach().to("cpu", copy=True) for p in trained]
    optimizer.eval()
    _into_model(engine.optimizer)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(trained, aside, strict=True):
                p.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True
        _into_model(engine.optimizer)


def _into_model(optimizer: Any) -> None:
    """Master weights into the model's, as DeepSpeed 0.19.8 does at the end of a step."""
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):  # stage 0 in bf16
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                weight.data.copy_(master.data)
