"""Losses of a mixture's routers: balanced loads, and logits that stay small. One rule over the whole optimizer step.

    aux = E / L * sum of f P over layers and experts
    z = 1 / (L T) * sum of logsumexp(logits)^2 over layers and tokens

over L layers with a router, E experts, and T tokens of the step: all packs, all accumulation steps, all ranks, padding
left out. f is how many of the T tokens a layer's expert is chosen by, divided by T; P is its mean probability, softmax
of the logits. Of one sequence and one layer aux is transformers' `load_balancing_loss_func`.

aux is a product of two means over the step, so a mean of packs' or ranks' own would be another loss. f has no gradient,
and P is a sum over tokens: where f is known, each rank's tokens have their share of the gradient. f is known after the
forward pass of a step's last pack. A step of one pack sums the choices over the ranks between its forward and backward
pass; one of several packs first runs them without gradient, a quarter to a third of a step.

The gradient enters behind the router's logits, whose probabilities the layer uses: parallelism stays beside the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_longft.errors import ModelError

NAMES = ("router_aux_loss", "router_z_loss")


class RouterLosses:
    """Sees a model's routers, and adds their losses' gradients. Registers nothing with the model but hooks."""

    def __init__(self, decoder: Any, aux: float, z: float) -> None:
        """`aux` and `z`: the factors. Raises ModelError: routers that do not tell their logits to transformers."""
        self.aux, self.z = aux, z
        recorder = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", None)
        routers = [m for m in decoder.modules() if kind is not None and isinstance(m, kind) and hasattr(m, "top_k")]
        if not routers or getattr(recorder, "index", None) != 0:
            raise ModelError(
                f"train.{NAMES[0]} or train.{NAMES[1]} is set, but {decoder.config.model_type} has no routers that "
                f"tell transformers their logits: leave both out"
            )
        self.top_k = int(routers[0].top_k)
        self.layers = len(routers)
        self.recording = False
        self.real = 0  # how many of this rank's tokens are no padding; they come first
        self.seen: list[Tensor] = [torch.empty(0)] * self.layers  # [3, E] choices, probabilities, and z, of the pack
        self.load: Tensor | None = None  # [L, E] f of the whole step
        self.tokens = 0.0  # T
        for i, router in enumerate(routers):
            router.register_forward_hook(lambda _, __, out, i=i: self._hook(i, out))

    def _hook(self, i: int, out: Any) -> Any:
        """A router's logits [s, E], weights and choices [s, k]."""
        logits, weights, choices, *more = out
        if self.recording:
            self._record(i, logits.detach(), choices)
        return logits, _Attached.apply(logits, weights, self, i), choices, *more

    @torch.no_grad()
    def _record(self, i: int, logits: Tensor, choices: Tensor) -> None:
        wide = logits[: self.real].float()
        counts = torch.bincount(choices[: self.real].reshape(-1), minlength=logits.shape[-1])
        squares = torch.zeros_like(counts, dtype=torch.float64)
        squares[0] = wide.logsumexp(-1).double().square().sum()
        self.seen[i] = torch.stack([counts.double(), wide.softmax(-1).sum(0, dtype=torch.float64), squares])

    def settle(self, choices: Tensor) -> None:
        """`choices` [L, E] of this rank's packs become the load of the whole step. Collective."""
        if dist.is_initialized():
            dist.all_reduce(choices)
        self.tokens = float(choices[0].sum()) / self.top_k
        self.load = choices / max(self.tokens, 1.0)

    @property
    def choices(self) -> Tensor:
        """[L, E] of the pack that was recorded last."""
        return torch.stack([seen[0] for seen in self.seen])

    def values(self) -> Tensor:
        """The recorded pack's share of both losses, [2]: those of all packs and ranks add up to the step's."""
        assert self.load is not None, "routers' losses are asked for before the loads are known"
        seen = torch.stack(self.seen)  # [L, 3, E]
        tokens = self.layers * max(self.tokens, 1.0)
        aux = seen.shape[-1] * (self.load * seen[:, 1]).sum() / tokens
        return torch.stack([aux, seen[:, 2].sum() / tokens])

    def gradient(self, i: int, logits: Tensor, real: int, world: int) -> Tensor:
        """Gradient of both losses by router i's logits [s, E], times `world`: the engine averages over ranks."""
        assert self.load is not None, "a router's backward pass before the loads are known"
        wide = logits[:real].float()
        p = wide.softmax(-1)
        by_p = (self.aux * wide.shape[-1] * self.load[i]).to(p.dtype)  # [E]
        of_real = p * (by_p - (p @ by_p)[:, None] + 2 * self.z * wide.logsumexp(-1, keepdim=True))
        grad = torch.zeros_like(logits)
        grad[:real] = (of_real * (world / (self.layers * max(self.tokens, 1.0)))).to(grad.dtype)
        return grad


class _Attached(torch.autograd.Function):
    """The routing weights as they are; in the backward pass the losses' gradient goes to the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weights: Tensor, losses: RouterLosses, i: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.losses, ctx.i, ctx.real = losses, i, losses.real
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Any, ...]:
        (logits,) = ctx.saved_tensors
        world = dist.get_world_size() if dist.is_initialized() else 1
        return ctx.losses.gradient(ctx.i, logits, ctx.real, world), dweights, None, None
