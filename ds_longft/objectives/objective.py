"""What an objective is: all that training, planning and checking ask of one. `sft` and `dpo` are the two there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_longft.batch import Pack
from ds_longft.config.run_config import RunConfig
from ds_longft.config.train_keys import DpoConfig
from ds_longft.layout import ParallelLayout

Reference = Literal["none", "adapter_off", "precomputed", "model"]
Passes = Literal["auto", "one", "two"]


@dataclass(frozen=True)
class Needs:
    """What an objective needs beside one pass of the model over a pack; known before a model is built."""

    reference: Reference = "none"  # where a reference's log-probabilities come from
    passes: Passes = "one"

    @classmethod
    def of(cls, config: RunConfig) -> Needs:
        """What the objective of a run config needs."""
        if config.objective == "sft":
            return cls()
        return cls(reference_of(config.dpo, lora=config.lora is not None), config.dpo.passes)


def reference_of(dpo: DpoConfig, *, lora: bool) -> Reference:
    """Where the reference's log-probabilities come from, `auto` resolved."""
    if dpo.loss == "simpo":
        return "none"
    if dpo.reference == "auto":
        return "adapter_off" if lora else "model"
    return dpo.reference


def loss_in_words(config: RunConfig) -> str:
    """What a run minimises, for its readers."""
    if config.objective == "sft":
        train = config.train
        factors = {"aux": train.router_aux_loss, "z": train.router_z_loss}
        more = "".join(f", {factor:g} times the routers' {name} loss" for name, factor in factors.items() if factor)
        return f"sum(w * ce) / sum(w) over the optimizer step, {config.data.weighting} weighting{more}"
    dpo = config.dpo
    more = f", label smoothing {dpo.label_smoothing:g}" if dpo.label_smoothing else ""
    more += f", gamma {dpo.simpo_gamma:g}" if dpo.loss == "simpo" else ""
    more += f", supervised term {dpo.rpo_alpha:g}" if dpo.rpo_alpha else ""
    return f"preference pairs, {dpo.loss}, beta {dpo.beta:g}{more}"


class Objective(nn.Module, ABC):
    """The module that the engine wraps. It holds the model and runs packs through the engine.

    The sums of a pack are float64 [1 + metrics], the loss first. Those of all ranks add up to the step's, and the
    step's divided by its weight is what is recorded.
    """

    metrics: tuple[str, ...] = ()
    """Names of what is recorded beside the loss."""

    reference: Reference = "none"
    passes: Literal["one", "two"] = "one"

    def __init__(self, model: nn.Module, layout: ParallelLayout, kernel: str) -> None:
        super().__init__()
        self.model, self.layout, self.kernel = model, layout, kernel

    def before_step(self, engine: Any, packs: Sequence[Pack], layout: ParallelLayout, device: torch.device) -> None:
        """What has to be known of all packs of this rank's step before the first of them is backpropagated."""

    @abstractmethod
    def backpropagate(
        self, engine: Any, pack: Pack, scale: float, layout: ParallelLayout, device: torch.device
    ) -> Tensor:
        """Forward and backward of one pack, one micro-step of the engine. Returns this rank's sums, without gradient.

        The loss is multiplied by `scale` before the backward pass. A loss that is not finite makes all of the gradient
        NaN, so that a check of the gradient sees it too.
        """

    @abstractmethod
    def evaluate(self, engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> Tensor:
        """The same sums. Call it without gradients."""

    @property
    def live_reference(self) -> bool:
        """Whether each pack is also run through a reference."""
        return self.reference in ("adapter_off", "model")

    def tokens_at_once(self, pack: Pack) -> int:
        """Tokens of a pack whose activations are in memory at the same time, over all sp ranks."""
        return pack.tokens
