"""A layer's stacked experts as grouped products: the rows of all experts in one product, not one product an expert.

Each token goes to k of E experts. Its row is copied k times, the copies are sorted by expert, and a grouped product
(torch's `grouped_mm`) multiplies each expert's rows with its weights, as transformers' own "grouped_mm" does. Here
LoRA's factors are grouped products as well. PEFT adds B A to the weights of all experts anew in each call: 1.1 GiB a
layer of Qwen3-30B-A3B, rounded to the weights' type, and its gradient a product as large as the experts' own.

It runs in tiles of tokens, and of a tile nothing is kept but its input: the backward pass computes gate and up again.
The routing weights scale the input of the down projection, so no output of an expert is needed for their gradient.
Inside a checkpointed layer the recomputation computes nothing here (`kept.UnusedOutput`).

Which expert modules: those of transformers' experts interface, whose attributes say how their weights lie. The others
(JetMoe) keep their own forward. Letters: t tokens of a tile, k experts of a token, n = t k rows, E experts, D hidden,
I width of an expert, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ds_longft.sequence.kept import Kept, UnusedOutput, computed_once
from ds_longft.sequence.linear import Weight, dense, save, saved, unhook, weight_of
from ds_longft.sequence.llama4 import route_inputs
from ds_longft.sequence.reuse import ours_alone
from ds_longft.sequence.tiles import add_tile, rounded, tiles_of

ROWS_OF_AN_EXPERT = 1024
"""Rows of each expert in a tile, on average: products this large run near the full rate, and 128 experts of 2,048
features have 0.5 GiB of them."""

ALIGNED = 8  # elements of bf16 in the 16 bytes that torch's grouped products want rows to be multiples of


def tile_of(experts: int, used: int, tile_tokens: int | None) -> int:
    """Tokens of a tile: `ROWS_OF_AN_EXPERT` for each expert, or fewer where `train.mlp_tile_tokens` says so."""
    tokens = max(1, ROWS_OF_AN_EXPERT * experts // used)
    return min(tokens, tile_tokens) if tile_tokens else tokens


@dataclass(frozen=True)
class _Spec:
    """Everything about a layer's experts that is not a tensor."""

    combine: Callable[[Tensor], Tensor]  # gate and up [n, 2 I] -> [n, I]
    transposed: bool  # weights are [E, in, out], else [E, out, in]
    scales: tuple[float, float]  # LoRA's factor, of gate and up, of down
    tile_tokens: int | None


class Experts:
    """The forward of a layer's experts: the module, or the outermost of the PEFT wrappers around it."""

    def __init__(self, outer: nn.Module, wrappers: dict[str, ParamWrapper], base: nn.Module, tile_tokens: int | None):
        self.outer, self.wrappers, self.base = outer, wrappers, base
        self.names = ("gate_up_proj" if base.has_gate else "up_proj", "down_proj")
        combine: Any = base._apply_gate if base.has_gate else base.act_fn
        scales = tuple(w.scaling[w.active_adapters[0]] if w else 1.0 for w in map(wrappers.get, self.names))
        self.spec = _Spec(combine, bool(base.is_transposed), (scales[0], scales[1]), tile_tokens)
        self.kept: Kept | None = None  # set by the checkpoint of the layer, for the next call
        outer.forward = self

    @property
    def tensors(self) -> list[Weight]:
        """W, bias, A [r E, in], B [out, r E] of gate and up, and of down, as PEFT holds them; looked up at each call
        because ZeRO-3 swaps them.
        """
        found: list[Weight] = []
        for name in self.names:
            wrapper = self.wrappers.get(name)
            found += [weight_of(self.base, name), getattr(self.base, f"{name}_bias", None)]
            if wrapper is None:
                found += [None, None]
            else:
                adapter = wrapper.active_adapters[0]
                found += [wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight]
        return found

    def unhook(self) -> None:
        """Under ZeRO-3, after its initialize: the layer gathers the weights (`linear.gather_with`)."""
        unhook(self.outer.modules())

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [.., D], the experts of each token [t, k] and their weights [t, k] -> [.., D]."""
        tensors = self.tensors
        if any(w.disable_adapters or w.merged for w in self.wrappers.values()):
            tensors = [t if i % 4 < 2 else None for i, t in enumerate(tensors)]
        out: Tensor = _Grouped.apply(x, index, weights, self.kept, self.spec, *tensors)
        if isinstance(self.kept, UnusedOutput):
            self.kept.node = out.grad_fn
        return out


def group_experts(layer: nn.Module, tile_tokens: int | None) -> list[Experts]:
    """Replace the forward of a decoder layer's stacked experts by a grouped one, where theirs is known."""
    route_inputs(layer)
    parents = [module for module in layer.modules() if not isinstance(module, ParamWrapper)]
    found = (_experts(child, tile_tokens) for parent in parents for child in parent.children())
    return [experts for experts in found if experts is not None]


def _experts(outer: nn.Module, tile_tokens: int | None) -> Experts | None:
    wrappers: dict[str, ParamWrapper] = {}
    base: Any = outer
    while isinstance(base, ParamWrapper):
        if len(base.active_adapters) != 1 or base.active_adapters[0] not in base.lora_A:
            return None
        wrappers[base.parameter_name] = base
        base = base.base_layer
    known = ("has_gate", "has_bias", "is_transposed", "num_experts")  # transformers' `use_experts_implementation`
    if any(not hasattr(base, name) for name in known) or getattr(base, "has_post_expert_norm", False):
        return None
    ours = {f"{name}{end}" for name in ("gate_up_proj", "up_proj", "down_proj") for end in ("", "_bias")}
    if not {name for name, _ in base.named_parameters()} <= ours or not wrappers.keys() <= ours:
        return None
    return Experts(outer, wrappers, base, tile_tokens)


@dataclass(frozen=True)
class _Stack:
    """One projection of all experts."""

    weight: Tensor  # [E, in, out]
    bias: Tensor | None  # [E, out]
    a: Tensor | None  # [E, r, in]
    b: Tensor | None  # [E, r, out], LoRA's factor in it
    transposed: bool  # the model holds it so
    scale: float  # LoRA's factor
    shapes: tuple[torch.Size, torch.Size] | None  # of A and B, as PEFT holds them

    @classmethod
    def of(
        cls, transposed: bool, scale: float, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None
    ) -> _Stack:
        """From the tensors as the model and PEFT hold them. The rank is filled up to what grouped products want."""
        weight = weight if transposed else weight.transpose(1, 2)
        if a is None or b is None:
            return cls(weight, bias, None, None, transposed, scale, None)
        experts, shapes = len(weight), (a.shape, b.shape)
        rank = len(a) // experts
        a = a.view(experts, rank, -1)  # [r E, in], expert by expert
        b = b.view(len(b), rank, experts).permute(2, 1, 0) * scale  # [out, r E], rank by rank
        more = (0, 0, 0, -rank % ALIGNED)
        return cls(weight, bias, F.pad(a, more).contiguous(), F.pad(b, more).contiguous(), transposed, scale, shapes)

    def forward(self, x: Tensor, route: _Route, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [n, in] -> [n, out] and x A' [n, r]; `weights` [n, 1] of the bias."""
        out = grouped(x, self.weight, route.ends)
        xa = None
        if self.a is not None and self.b is not None:
            xa = grouped(x, self.a.transpose(1, 2), route.ends)
            out += grouped(xa, self.b, route.ends)
        if self.bias is not None:
            bias = self.bias[route.experts]
            out += bias if weights is None else (bias * weights).to(bias.dtype)
        return out, xa

    def input_gradient(self, dy: Tensor, route: _Route) -> tuple[Tensor, Tensor | None]:
        """dy [n, out] -> dx [n, in], and the gradient of x A' [n, r]."""
        dx = grouped(dy, self.weight.transpose(1, 2), route.ends)
        if self.a is None or self.b is None:
            return dx, None
        dxa = grouped(dy, self.b.transpose(1, 2), route.ends)
        dx += grouped(dxa, self.a, route.ends)
        return dx, dxa

    def gradients(
        self, x: Tensor, dy: Tensor, xa: Tensor | None, dxa: Tensor | None, weights: Tensor | None, route: _Route,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of W, bias, A and B, shaped as the model and PEFT hold them. `xa`: x A', `dxa`: its gradient."""
        grads: list[Tensor | None] = [None] * 4
        if needed[0]:
            grads[0] = _outer(x, dy, route) if self.transposed else _outer(dy, x, route)
        if needed[1] and self.bias is not None:
            rows = dy if weights is None else dy * weights
            sums = torch.zeros_like(self.bias, dtype=torch.promote_types(dy.dtype, torch.float32))
            grads[1] = sums.index_add_(0, route.experts, rows.to(sums.dtype))
        if xa is not None and dxa is not None and self.shapes is not None:
            of_a, of_b = self.shapes
            rank = of_a[0] // len(self.weight)
            grads[2] = _outer(dxa, x, route)[:, :rank].reshape(of_a)  # [E, r, in]
            b = _outer(xa, dy, route)[:, :rank] * self.scale  # [E, r, out]
            grads[3] = b.permute(2, 1, 0).reshape(of_b)
        return grads


@dataclass(frozen=True)
class _Route:
    """Which rows go to which expert, sorted by it."""

    experts: Tensor  # [n] of each row
    tokens: Tensor  # [n] whose copy each row is
    ends: Tensor  # [E] int32, where each expert's rows end
    order: Tensor  # [n] which of the t k choices each row is
    back: Tensor  # [n] where each choice is among the rows

    @classmethod
    def of(cls, index: Tensor, count: int) -> _Route:
        """`index` [t, k] expert ids. No synchronisation, and nothing whose result depends on the order of adds."""
        experts, order = index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(count, device=index.device, dtype=experts.dtype), right=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return cls(experts, order // index.shape[1], ends.int(), order, back)

    def summed(self, rows: Tensor, tokens: int) -> Tensor:
        """[n, D] rows -> [t, D], those of a token added."""
        return rows[self.back].view(tokens, -1, rows.shape[-1]).sum(1)


class _Grouped(torch.autograd.Function):
    """y_t = sum over a token's experts of w (act(x W1 + ..) W2 + ..), tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, weights: Tensor, kept: Kept | None, spec: _Spec, *tensors: Weight
    ) -> Tensor:
        """x [.., D], index and weights [t, k]. `tensors`: W, bias, A, B of gate and up, and of down."""
        x2 = x.reshape(-1, x.shape[-1])  # [t, D]

        def compute() -> tuple[Tensor, Tensor]:
            out = torch.empty_like(x2)
            first, second = _stacks(spec, [dense(t) for t in tensors])
            for rows in _tiles(index, spec, len(first.weight)):
                route = _Route.of(index[rows], len(first.weight))
                w = weights[rows].reshape(-1, 1)[route.order]  # [n, 1]
                c = spec.combine(first.forward(x2[rows][route.tokens], route)[0])  # [n, I]
                y = second.forward((c * w).to(c.dtype), route, w)[0]  # [n, D]
                del c
                out[rows] = route.summed(y, len(index[rows]))
                del y
            return out, x2.new_empty(0)

        out, _ = computed_once(kept, compute)
        save(ctx, (x2.detach(), index, weights), tensors)  # see `ours_alone`
        ctx.spec = spec
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        """Gradients of x, of the routing weights, and of whatever is trained, a tile at a time."""
        x2, index, weights, *tensors = map(dense, saved(ctx))
        spec: _Spec = ctx.spec
        first, second = _stacks(spec, tensors)
        needed = ctx.needs_input_grad[5:]
        dout = dout.reshape(x2.shape)
        dx = (x2 if ours_alone(x2) else torch.empty_like(x2)) if ctx.needs_input_grad[0] else None
        dweights = torch.empty_like(weights) if ctx.needs_input_grad[2] else None
        sums: list[Tensor | None] = [None] * len(tensors)
        for rows in _tiles(index, spec, len(first.weight)):
            route, t = _Route.of(index[rows], len(first.weight)), len(index[rows])
            w = weights[rows].reshape(-1, 1)[route.order]  # [n, 1]
            xs, dy = x2[rows][route.tokens], dout[rows][route.tokens]  # [n, D]
            leaf, xa = first.forward(xs, route)
            with torch.enable_grad():
                product = spec.combine(leaf.requires_grad_())  # [n, I]
            c = product.detach()
            dscaled, dca = second.input_gradient(dy, route)  # of c w
            scaled = (c * w).to(c.dtype)
            if dweights is not None:
                of_row = (dscaled * c).sum(-1, dtype=torch.promote_types(c.dtype, torch.float32))
                if second.bias is not None:
                    of_row += (dy * second.bias[route.experts]).sum(-1, dtype=of_row.dtype)
                dweights[rows] = of_row[route.back].view(t, -1).to(weights.dtype)
            ca = None if second.a is None else grouped(scaled, second.a.transpose(1, 2), route.ends)
            add_tile(sums, second.gradients(scaled, dy, ca, dca, w, route, needed[4:]), 4)
            del scaled, c, dy
            (dleaf,) = torch.autograd.grad(product, leaf, (dscaled * w).to(dscaled.dtype))
            dleaf = dleaf.contiguous()
            del product, leaf, dscaled
            dxs, dxa = first.input_gradient(dleaf, route)
            add_tile(sums, first.gradients(xs, dleaf, xa, dxa, None, route, needed[:4]), 0)
            del dleaf, xs
            if dx is not None:
                dx[rows] = route.summed(dxs, t)
            del dxs
        return dx.view(dout.shape) if dx is not None else None, None, dweights, None, None, *rounded(sums, tensors)


def grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a [n, K] times b [E, K, N] -> [n, N], rows up to `ends`[e] with matrix e. bf16 by torch, else a loop."""
    if _torch_can(a, b):
        return _grouped_mm(a, b, ends)
    out = a.new_empty(len(a), b.shape[-1])
    for matrix, (start, end) in zip(b, _groups(ends), strict=True):
        torch.mm(a[start:end], matrix, out=out[start:end])
    return out


def _outer(a: Tensor, b: Tensor, route: _Route) -> Tensor:
    """a [n, M]' times b [n, N] of each expert's rows -> [E, M, N]; zero where it has none."""
    if _torch_can(a, b):
        none = torch.diff(route.ends, prepend=route.ends.new_zeros(1)) == 0
        # torch leaves it as it finds the memory on some GPUs (B200, torch 2.9)
        return _grouped_mm(a.t(), b, route.ends).masked_fill_(none[:, None, None], 0)
    return torch.stack([a[start:end].t() @ b[start:end] for start, end in _groups(route.ends)])


def _torch_can(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped products take these: bf16, rows of multiples of 16 bytes."""
    wide = (t.shape[-1] if t.stride(-1) == 1 else t.shape[-2] for t in (a, b))
    return a.dtype == b.dtype == torch.bfloat16 and all(n % ALIGNED == 0 for n in wide)


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    product: Callable[..., Tensor] = F.grouped_mm
    return product(a, b, offs=ends)


def _groups(ends: Tensor) -> Iterator[tuple[int, int]]:
    """Start and end of each expert's rows, on the host."""
    start = 0
    for end in ends.tolist():
        yield start, end
        start = end


def _stacks(spec: _Spec, tensors: Sequence[Any]) -> tuple[_Stack, _Stack]:
    """Gate and up, and down."""
    first, second = ((spec.transposed, scale) for scale in spec.scales)
    return _Stack.of(*first, *tensors[:4]), _Stack.of(*second, *tensors[4:])


def _tiles(index: Tensor, spec: _Spec, experts: int) -> list[slice]:
    tokens, used = index.shape
    return tiles_of(tokens, tile_of(experts, used, spec.tile_tokens))
