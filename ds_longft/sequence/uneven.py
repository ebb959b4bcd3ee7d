"""Experts that keep their own forward, where a rank's tokens may all go to others.

A weight that no token of a rank uses has no gradient there, and other ranks wait for it: ZeRO 1 to 3 fill buckets in
the order in which gradients come, so a rank that lacks one adds other weights' gradients to them, or hangs. Here the
gradients of all of a layer's experts come at once, in one order, and are zeros where no token went. `experts.Experts`
do so by themselves; what is left are experts with identities among them (LongCat), and lists of experts (remote code).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_longft.sequence.experts import Experts
from ds_longft.sequence.linear import gather_with, unhook


class UnevenExperts:
    """The forward of the module around a layer's experts: they read views of their trained weights."""

    def __init__(self, parent: nn.Module, experts: nn.Module, stage: int) -> None:
        """Under ZeRO-3 `parent` gathers all of them: an expert alone would, on those ranks only that call it."""
        self.experts, self.plain = experts, parent.forward
        parent.forward = self
        if stage == 3:
            gather_with(parent, experts.parameters())

    def unhook(self) -> None:
        """Under ZeRO-3, after its initialize."""
        unhook(self.experts.modules())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, a tensor or a tuple that begins with it."""
        owners = [
            (module._parameters, name)
            for module in self.experts.modules()
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad
        ]
        if not owners or not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        views = _Together.apply(*(parameters[name] for parameters, name in owners))
        with _replaced(owners, views):
            out = self.plain(*args, **kwargs)
        if isinstance(out, Tensor):
            return _Reached.apply(out, *views)
        return _Reached.apply(out[0], *views), *out[1:]


def reach_experts(layer: nn.Module, grouped: Sequence[Experts], stage: int) -> list[UnevenExperts]:
    """See that the weights of all of a decoder layer's experts that are not `grouped` have gradients on every rank."""
    ours = {id(experts.outer) for experts in grouped}
    found = [(parent, dict(parent.named_children()).get("experts")) for parent in layer.modules()]
    return [UnevenExperts(parent, each, stage) for parent, each in found if each is not None and id(each) not in ours]


@contextmanager
def _replaced(owners: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, modules have these tensors in place of their parameters."""
    own = [parameters[name] for parameters, name in owners]
    try:
        for (parameters, name), tensor in zip(owners, tensors, strict=True):
            parameters[name] = tensor
        yield
    finally:
        for (parameters, name), parameter in zip(owners, own, strict=True):
            parameters[name] = parameter


class _Together(torch.autograd.Function):
    """Views of the weights, whose gradients are handed on once all are there; autograd makes zeros of those missing."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class _Reached(torch.autograd.Function):
    """x as it is; its backward pass also reaches the weights, with no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return dx, *(None for _ in ctx.needs_input_grad[1:])
