"""Linear layers with LoRA inside, and with outputs that can be kept across activation checkpointing.

PEFT computes base(x) + B(A(x)) * scale with a copy for each term, and reads x again for each of q, k, v. Here linears
that read the same input are one group: one product with all their A matrices, the base product, then the low-rank term
added in place. Where outputs are much wider than inputs, the low-rank term is folded into the base product as extra
columns (`folds`). The arithmetic is PEFT's; the adapters stay PEFT's modules, so saving and loading know nothing of
this.
A base weight may be packed in fewer bits (`model/packed.py`): a module whose call makes it. It is made where a product
reads it and let go of behind it, in forward, recomputation and backward; never kept for the backward pass.
What is not plain LoRA (dropout, DoRA, several or merged adapters, other layer types) keeps PEFT's own path.

Letters: t tokens, I input and O output features, r rank, m members of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ds_longft.sequence.kept import Kept, UnusedOutput, computed_once
from ds_longft.sequence.recomputed_input import RecomputedInput

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears that Hugging Face models call one after the other with the same input."""

Weight = Tensor | nn.Module | None
"""A tensor, or the module that makes it of a packed one."""


Made = tuple[RecomputedInput, Tensor] | None
"""What makes a group's input again in the backward pass, and of what."""


def dense(weight: Weight) -> Any:
    """The tensor itself."""
    return weight() if isinstance(weight, nn.Module) else weight


def weight_of(module: nn.Module, name: str = "weight") -> Weight:
    """The module's weight of that name, a packed one without making it."""
    held: Any = getattr(module, "parametrizations", {})
    return held[name] if name in held else getattr(module, name)


def save(ctx: Any, first: Sequence[Tensor], weights: Sequence[Weight]) -> None:
    """Save tensors for the backward pass, of packed weights what makes them; `saved` returns them all."""
    ctx.packed = {i: w for i, w in enumerate(weights, len(first)) if isinstance(w, nn.Module)}
    ctx.save_for_backward(*first, *(None if isinstance(w, nn.Module) else w for w in weights))


def saved(ctx: Any) -> list[Any]:
    """What `save` was given."""
    return [ctx.packed.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]


@dataclass(frozen=True)
class Member:
    """One linear layer: its weights, looked up at each call because ZeRO-3 swaps them."""

    base: nn.Linear
    lora: tuple[nn.Linear, nn.Linear, float] | None  # A, B, scale

    def tensors(self) -> tuple[Weight, ...]:
        """W [O, I], bias [O], A [r, I], B [O, r]."""
        a, b = (self.lora[0].weight, self.lora[1].weight) if self.lora else (None, None)
        return weight_of(self.base), self.base.bias, a, b

    def plain(self, x: Tensor, tensors: Sequence[Weight] | None = None) -> Tensor:
        """The layer's output, by autograd and without calling its modules; with `tensors` in place of its own."""
        weight, bias, a, b = map(dense, self.tensors() if tensors is None else tensors)
        assert weight is not None
        out = F.linear(x, weight, bias)
        if self.lora is None or a is None or b is None:
            return out
        return out + F.linear(F.linear(x, a), b) * self.lora[2]

    @classmethod
    def of(cls, module: nn.Module) -> Member | None:
        """The layer as a member, or None where it is something this path would compute differently."""
        if _is_linear(module):
            return cls(module, None)
        of_weight = type(module) is ParamWrapper and module.parameter_name == "weight"  # `model/lora_targets.py`
        if not (type(module) is PeftLinear or of_weight) or not _is_linear(module.base_layer):
            return None
        layer: Any = module  # PEFT types its containers as modules
        active = layer.active_adapters
        if len(active) != 1 or layer.merged or layer.disable_adapters or active[0] not in layer.lora_A:
            return None
        name = active[0]
        plain = not layer.lora_variant.get(name) and isinstance(layer.lora_dropout[name], nn.Identity)
        if not plain or layer.lora_B[name].bias is not None:
            return None
        return cls(layer.base_layer, (layer.lora_A[name], layer.lora_B[name], layer.scaling[name]))


def _is_linear(module: Any) -> TypeGuard[nn.Linear]:
    return parametrize.type_before_parametrizations(module) is nn.Linear


def unhook(modules: Iterable[nn.Module]) -> None:
    """Take ZeRO-3's hooks off these modules: nothing of theirs is gathered on their call any more.

    The hooks also write down which module is called when, and ranks whose lists differ stop or hang: what is called
    once a tile, as often as this rank's pack is long, must have none.
    """
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if hook.__module__.startswith("deepspeed.")]:
                del hooks[key]


class LinearGroup:
    """Linears that read the same input, computed together on the first one's call."""

    def __init__(self, names: Sequence[str], modules: Sequence[nn.Module], members: Sequence[Member]) -> None:
        self.names, self.modules, self.members = tuple(names), list(modules), list(members)
        self.kept: Kept | None = None  # set by the checkpoint of the layer, for the next call
        self.recomputed_input: RecomputedInput | None = None  # where the input can be made again in the backward pass
        self._input: tuple[Tensor, int] | None = None  # and its version: nobody may have written into it since
        self._waiting: dict[int, Tensor] = {}
        for i, module in enumerate(modules):
            module.forward = partial(self._call, i)

    @property
    def out_features(self) -> int:
        """Output features of all members: what keeping costs per token."""
        return sum(m.base.out_features for m in self.members)

    @property
    def tensors(self) -> list[Weight]:
        """W, bias, A, B of each member, as `linears_forward` takes them."""
        return [t for m in self.members for t in m.tensors()]

    @property
    def scales(self) -> tuple[float, ...]:
        """LoRA's factor of each member."""
        return tuple(m.lora[2] if m.lora else 1.0 for m in self.members)

    def unhook(self) -> None:
        """Under ZeRO-3, after its initialize: take its hooks off these modules and all below them, the layer gathers
        their weights (`gather_with`).

        A hook hands its module a new tensor for the input. Siblings then look as if they read different inputs and are
        computed twice: 31 % more operations in a Llama-8B's linears, and twice the memory of a step (DeepSpeed 0.19.8).
        """
        for module in self.modules:
            unhook(module.modules())

    def slot(self) -> Kept:
        """A place on the device to keep the outputs of one call."""
        return Kept(copy="q_proj" in self.names)

    def _call(self, i: int, x: Tensor) -> Tensor:
        module = self.modules[i]
        source = self.recomputed_input.source_of(x) if self.recomputed_input is not None and i == 0 else None
        if getattr(module, "merged", False):
            return self.members[i].base(x)
        if getattr(module, "disable_adapters", False):
            return self._without_adapters(i, x)
        if i in self._waiting and self._input is not None and x is self._input[0] and x._version == self._input[1]:
            out = self._waiting.pop(i)
            if not self._waiting:
                self._input = None
            return out
        self._input, self._waiting = None, {}
        made = (self.recomputed_input, source) if self.recomputed_input is not None and source is not None else None
        tensors, scales = (self.tensors, self.scales) if i == 0 else (self.members[i].tensors(), self.scales[i : i + 1])
        outs: tuple[Tensor, ...] = _Linears.apply(x, self.kept if i == 0 else None, made, scales, *tensors)
        if isinstance(self.kept, UnusedOutput):
            self.kept.node = outs[0].grad_fn
        if i == 0 and len(outs) > 1:
            self._input, self._waiting = (x, x._version), dict(enumerate(outs[1:], 1))
        return outs[0]

    def _without_adapters(self, i: int, x: Tensor) -> Tensor:
        """Member i's own output, by the product that its group computes with adapters, their columns zero.

        The reference of a preference pair then is the policy before its first step, to the bit; another product may
        round otherwise (on CPUs it does).
        """
        member, x2 = self.members[i], x.reshape(-1, x.shape[-1])  # [t, I]
        rank = sum(m.lora[0].out_features for m in self.members if m.lora)
        outer = sum(m.base.out_features for m in self.members if m.lora)
        if member.lora is None or not folds(len(x2), x2.shape[1], outer):
            return member.base(x)
        weight = member.base.weight
        wide = _beside(x2, x2.new_zeros(len(x2), rank)), _beside(weight, weight.new_zeros(len(weight), rank))
        return F.linear(*wide, member.base.bias).view(*x.shape[:-1], -1)


class _Linears(torch.autograd.Function):
    """out_i = x W_i' + bias_i + scale_i (x A_i') B_i' for the members of a group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Kept | None, made: Made, scales: tuple[float, ...], *tensors: Weight
    ) -> tuple[Tensor, ...]:
        """x [.., I] -> m outputs [.., O_i]. `tensors`: W, bias, A, B of each member. `made`: x is made of this."""
        x2 = x.reshape(-1, x.shape[-1])  # [t, I]
        *outs, xa = computed_once(kept, lambda: linears_forward(x2, scales, tensors))
        save(ctx, (x2 if made is None else made[1], xa), tensors)
        ctx.scales, ctx.shape, ctx.recomputed_input = scales, x.shape, made[0] if made is not None else None
        # no views for autograd, or a model could not clip them in place (OLMo); what is kept of q, k and v is a copy
        return tuple(out.view(*x.shape[:-1], out.shape[-1]).data for out in outs)

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Any, ...]:
        """Gradients of x, and of W and bias where they are trained, and of A and B."""
        x2, xa, *tensors = saved(ctx)
        if ctx.recomputed_input is not None:
            x2 = ctx.recomputed_input.again(x2).reshape(-1, ctx.shape[-1])
        needed = ctx.needs_input_grad
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in douts]  # [t, O]
        dx, grads = linears_backward(dys, x2, xa, ctx.scales, tensors, (needed[0], *needed[4:]))
        return (dx.view(ctx.shape) if dx is not None else None, None, None, None, *grads)


def linears_forward(x2: Tensor, scales: Sequence[float], tensors: Sequence[Weight]) -> tuple[Tensor, ...]:
    """x2 [t, I] -> the m outputs [t, O_i], and x A' [t, sum of r] of all adapters, one pass over x."""
    quads = _quads(tensors)
    xa = low_rank(x2, tensors)
    adapted = sum(len(b) for *_, b in quads if b is not None)
    wide = _beside(x2, xa) if folds(len(x2), x2.shape[1], adapted) else None  # [t, I + R]
    outs, start = [], 0
    for (w, bias, a, b), scale in zip(quads, scales, strict=True):
        own = slice(start, start + (0 if a is None else len(a)))  # this member's columns of x A'
        start = own.stop
        if a is not None and wide is not None:
            columns = b.new_zeros(len(b), xa.shape[1])
            columns[:, own] = b * scale
            outs.append(F.linear(wide, _beside(dense(w), columns), bias))  # [t, O]
            continue
        out = F.linear(x2, dense(w), bias)  # [t, O]
        if a is not None:
            out.addmm_(xa[:, own], b.t(), alpha=scale)
        outs.append(out)
    return (*outs, xa)


def folds(tokens: int, inner: int, outer: int) -> bool:
    """Whether y [tokens, outer] = x W' + u B', x [tokens, inner], is computed as one product [x | u] [W | B]'.

    That spares reading and writing y once more, for copies of x and of W. On an H200, 65,536 tokens, 4,096 to 14,336
    features, rank 16: adding takes 1.58 ms after a product of 11.35 ms; the copies 0.45 ms for gate and up together,
    and the wider product 0.2 ms more.
    """
    return tokens * outer > 2 * inner * (tokens + outer)


def _beside(x: Tensor, columns: Tensor) -> Tensor:
    """[n, I], [n, R] -> [n, I + R], R filled up to a multiple of 8: fast kernels want rows of 16 bytes."""
    return torch.cat([x, columns, x.new_zeros(len(x), -columns.shape[1] % 8)], dim=1)


def low_rank(x2: Tensor, tensors: Sequence[Weight]) -> Tensor:
    """x A' [t, sum of r] of all adapters of a group, one pass over x; empty without adapters."""
    downs = [a for _, _, a, _ in _quads(tensors) if a is not None]
    return x2 @ torch.cat(downs).t() if downs else x2.new_empty(0)


def linears_backward(
    dys: Sequence[Tensor],
    x2: Tensor,
    xa: Tensor,
    scales: Sequence[float],
    tensors: Sequence[Weight],
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x [t, I] and of each of `tensors`, from those of the outputs [t, O_i].

    `needed`: of x, then of each of `tensors`. A frozen W costs nothing, A and B are always given.
    """
    quads = _quads(tensors)
    downs = [a for _, _, a, _ in quads if a is not None]
    parts = iter(xa.split([a.shape[0] for a in downs], dim=1) if downs else ())  # [t, r] each, views
    grads: list[Tensor | None] = []
    dxas = []
    for i, ((_, bias, a, b), dy, scale) in enumerate(zip(quads, dys, scales, strict=True)):
        need_w, need_bias = needed[1 + 4 * i], needed[2 + 4 * i]
        grads += [dy.t() @ x2 if need_w else None, dy.sum(0) if need_bias and bias is not None else None]
        if a is None:
            grads += [None, None]
            continue
        dxas.append((dy @ b).mul_(scale))  # [t, r]
        grads += [None, (dy.t() @ next(parts)).mul_(scale)]  # A's comes below, B's is [O, r]
    dxa = torch.cat(dxas, dim=1) if len(dxas) > 1 else dxas[0] if dxas else None  # [t, sum of r]
    if dxa is not None:
        das = iter((dxa.t() @ x2).split([a.shape[0] for a in downs]))  # [r, I] each, one pass over x
        for i, (_, _, a, _) in enumerate(quads):
            if a is not None:
                grads[4 * i + 2] = next(das)
    return _input_gradient(dys, [w for w, *_ in quads], dxa, downs) if needed[0] else None, grads


def _input_gradient(
    dys: Sequence[Tensor], weights: Sequence[Weight], dxa: Tensor | None, downs: Sequence[Tensor]
) -> Tensor:
    """dx [t, I]: the sum of dy_i W_i, and dxa [t, sum of r] times the A of all members."""
    if dxa is not None and len(dys) == 1 and folds(len(dys[0]), dys[0].shape[1], downs[0].shape[1]):
        rest = downs[0].new_zeros(-len(downs[0]) % 8, downs[0].shape[1])
        return _beside(dys[0], dxa) @ torch.cat([dense(weights[0]), downs[0], rest])  # [t, O + R] [O + R, I]
    dx = dys[0] @ dense(weights[0])
    for dy, w in zip(dys[1:], weights[1:], strict=True):
        dx.addmm_(dy, dense(w))
    return dx if dxa is None else dx.addmm_(dxa, torch.cat(tuple(downs)))


def _quads(tensors: Sequence[Weight]) -> list[tuple[Any, Any, Any, Any]]:
    """W, bias, A, B of each member."""
    return [tuple(tensors[i : i + 4]) for i in range(0, len(tensors), 4)]  # type: ignore[misc]


def fuse_linears(layer: nn.Module) -> list[LinearGroup]:
    """Replace the forward of a decoder layer's linears by grouped ones; returns the groups, in no particular order.

    Under ZeRO-3 a group reads weights of modules that are not called: see `gather_with`.
    """
    groups = []
    for names in _groups_of(layer):
        modules = [getattr(layer, n) for n in names]
        groups.append(LinearGroup(names, modules, [m for m in map(Member.of, modules) if m is not None]))
    for child in layer.children():
        if not isinstance(child, BaseTunerLayer):  # the linears inside an adapter layer are its own business
            groups += fuse_linears(child)
    return groups


def gather_with(module: nn.Module, weights: Iterable[Weight]) -> None:
    """Under ZeRO-3: gather these weights when `module` is entered, as one collective. Else nothing.

    Not a ZeRO-3 leaf: that reduces gradients when the module's input has its gradient, before those of the adapters
    exist (DeepSpeed 0.19.8).
    """
    import deepspeed

    for weight in weights:
        if isinstance(weight, Tensor):  # a packed one lies whole on each rank
            deepspeed.zero.register_external_parameter(module, weight)


def _groups_of(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of this module's own linears, siblings together; a sibling that cannot be grouped splits its group."""
    names = {n for n, child in parent.named_children() if Member.of(child) is not None}
    for group in SIBLINGS:
        if names.issuperset(group):
            yield group
            names -= set(group)
    yield from ((n,) for n in sorted(names))
