"""Preference training (DPO and its relatives): the module the engine wraps, and the loss of a pair.

A pair's loss depends on four numbers, the log-probabilities of two answers under the model and under a reference. Its
gradient by the model's parameters is the gradient of a weighted sum of these log-probabilities, with the loss's own
derivatives as weights: so one small all-reduce of per-document sums, without gradient, is all that sequence parallelism
needs, and the backward pass is that of supervised fine-tuning with a weight for each document.

Sources: DPO arXiv 2305.18290, cDPO (label smoothing) Mitchell 2023, IPO arXiv 2310.12036 (normalised by length as TRL
does, on its authors' word), SimPO arXiv 2405.14734, the supervised term arXiv 2404.19733.
Letters: P pairs, N documents of a pack.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ds_longft.batch import Batch
from ds_longft.config.run_config import DpoConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import adapters_off
from ds_longft.objectives.forward import ShardedModel

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Named as TRL names them; each is a mean over the pairs of a step."""

Reference = Literal["none", "adapter_off", "precomputed", "model"]


def reference_of(dpo: DpoConfig, *, lora: bool) -> Reference:
    """Where the reference's log-probabilities come from, `auto` resolved."""
    if dpo.loss == "simpo":
        return "none"
    if dpo.reference == "auto":
        return "adapter_off" if lora else "model"
    return dpo.reference


class DpoObjective(nn.Module):
    """Holds the model and, where it needs one of its own, the frozen reference model."""

    def __init__(
        self,
        model: nn.Module,
        layout: ParallelLayout,
        dpo: DpoConfig,
        kernel: str = "auto",
        *,
        reference_model: nn.Module | None = None,
        kv_heads_at_a_time: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.reference_model = reference_model
        self.layout = layout
        self.kernel = kernel
        self.dpo = dpo
        self.reference = reference_of(dpo, lora=isinstance(model, PeftModel))
        assert (self.reference == "model") == (reference_model is not None)
        self.passes: Literal["one", "two"] = "two" if dpo.passes == "two" else "one"  # auto: whoever plans the run
        heads = kv_heads_at_a_time
        self._sharded = ShardedModel(model, kv_heads_at_a_time=heads, adapters_off=isinstance(model, PeftModel))
        self._reference = None
        if reference_model is not None:
            self._reference = ShardedModel(reference_model, kv_heads_at_a_time=heads)

    @property
    def live_reference(self) -> bool:
        """Whether each step runs the reference."""
        return self.reference in ("adapter_off", "model")

    def forward(self, batch: Batch, of_reference: bool = False) -> Tensor:
        """This rank's sums of -log p over the targets of each document, [N] float64 (one scalar where they do not know
        their document); no collective beyond attention's. `of_reference`: without gradient.
        """
        sharded = self._reference if of_reference and self._reference is not None else self._sharded
        off = of_reference and self._reference is None and isinstance(self.model, PeftModel)
        with adapters_off(self.model) if off else nullcontext():
            return sharded.loss_sums(batch, self.layout, self.kernel)


@dataclass(frozen=True)
class PairLosses:
    """What the log-probabilities of some pairs amount to; nothing in it has a gradient."""

    losses: Tensor  # [P]
    rewards: Tensor  # [P, 2] chosen, rejected
    logps: Tensor  # [P, 2]
    gradient: Tensor  # [P, 2] of each pair's loss by its own log-probabilities

    def sums(self, weights: Tensor) -> Tensor:
        """[1 + metrics] weighted by the pairs' weights [P]: the loss, then `METRICS`."""
        chosen, rejected = self.rewards.unbind(1)
        accuracy = (chosen > rejected).to(chosen.dtype)
        columns = [self.losses, chosen, rejected, chosen - rejected, accuracy, *self.logps.unbind(1)]
        return torch.stack(columns) @ weights


def pair_losses(policy: Tensor, reference: Tensor | None, lengths: Tensor, dpo: DpoConfig) -> PairLosses:
    """Loss, rewards and gradient of pairs.

    Args:
        policy: [P, 2] log-probabilities of the chosen and the rejected answer, summed over their tokens.
        reference: [P, 2] the same of the reference, None for a loss without one.
        lengths: [P, 2] trained tokens of the answers.
        dpo: the kind of loss and its settings.
    """
    logps = policy.detach().requires_grad_()
    with torch.enable_grad():
        ratios = logps if reference is None else logps - reference
        scores = ratios if dpo.loss == "sigmoid" else ratios / lengths
        margin = scores[:, 0] - scores[:, 1]
        if dpo.loss == "ipo":
            losses = (margin - 1 / (2 * dpo.beta)) ** 2
        else:
            z = dpo.beta * margin - (dpo.simpo_gamma if dpo.loss == "simpo" else 0.0)
            losses = -(1 - dpo.label_smoothing) * logsigmoid(z) - dpo.label_smoothing * logsigmoid(-z)
        if dpo.rpo_alpha:
            losses = losses - dpo.rpo_alpha * logps[:, 0] / lengths[:, 0]
        (gradient,) = torch.autograd.grad(losses.sum(), logps)
    rewards = dpo.beta * (scores if dpo.loss == "simpo" else ratios)
    return PairLosses(losses.detach(), rewards.detach(), logps.detach(), gradient)
