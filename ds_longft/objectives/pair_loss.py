"""The loss of preference pairs (DPO and its relatives) as a function of log-probabilities.

A pair's loss depends on four numbers, the log-probabilities of two answers under the model and under a reference. Its
gradient by the model's parameters is the gradient of a weighted sum of these log-probabilities, with the loss's own
derivatives as weights: so one small all-reduce of per-document sums, without gradient, is all that sequence parallelism
needs, and the backward pass is that of supervised fine-tuning with a weight for each document.

Sources: DPO arXiv 2305.18290, cDPO (label smoothing) Mitchell 2023, IPO arXiv 2310.12036 (normalised by length as TRL
does, on its authors' word), SimPO arXiv 2405.14734, the supervised term arXiv 2404.19733.
Letters: P pairs, N documents of a pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ds_longft.config.train_keys import DpoConfig

METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Named as TRL names them; each is a mean over the pairs of a step."""


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
