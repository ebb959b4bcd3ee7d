"""MLPs over some of a rank's tokens at a time: no tensor of intermediate width for the whole shard.

gate, up and their product are 14,336 features a token in a Llama-8B, four times over at the peak of a backward pass;
with tiles only x, y and their gradients (4,096 each) are whole. Forward computes tile by tile and keeps x; backward
computes gate and up of a tile again and is done with it. Inside a checkpointed layer the recomputation calls this a
second time, for an output that only feeds the residual add: nothing is computed then (`kept.UnusedOutput`). So gate and
up run forward twice and down once, as without tiles. Source: TiledMLP of arXiv 2506.13996, which runs all three of them
forward three times. An MLP without a gate (Nemotron-H) is down(act(up(x))): 21,504 features there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_longft.sequence.kept import Kept, UnusedOutput, computed_once
from ds_longft.sequence.linear import (
    LinearGroup,
    Weight,
    dense,
    linears_backward,
    linears_forward,
    low_rank,
    save,
    saved,
)
from ds_longft.sequence.reuse import ours_alone
from ds_longft.sequence.tiles import add_tile, rounded, tiles_of

Combine = Callable[..., Tensor]


@dataclass(frozen=True)
class _Spec:
    """Everything about one MLP that is not a tensor."""

    tile_tokens: int
    combine: Combine  # act(gate) * up, or act(up)
    scales: tuple[tuple[float, ...], tuple[float, ...]]  # of gate and up, of down
    split: int  # how many of the tensors belong to gate and up


class TiledMlp:
    """The forward of a module with up_proj, down_proj and maybe gate_proj, `tile_tokens` tokens at a time."""

    def __init__(self, mlp: nn.Module, gate_up: LinearGroup, down: LinearGroup, tile_tokens: int) -> None:
        self.gate_up, self.down, self.tile_tokens = gate_up, down, tile_tokens
        self.plain = mlp.forward
        self.combine = _combine(mlp, gated=len(gate_up.modules) == 2)
        self.kept: Kept | None = None  # set by the checkpoint of the layer, before each call
        mlp.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., D]."""
        modules = (*self.gate_up.modules, *self.down.modules)
        if any(getattr(m, "disable_adapters", False) or getattr(m, "merged", False) for m in modules):
            return self._plain(x)
        first, second = self.gate_up.tensors, self.down.tensors
        spec = _Spec(self.tile_tokens, self.combine, (self.gate_up.scales, self.down.scales), len(first))
        out: Tensor = _Tiled.apply(x, self.kept, spec, *first, *second)
        if isinstance(self.kept, UnusedOutput):
            self.kept.node = out.grad_fn
        return out

    def _plain(self, x: Tensor) -> Tensor:
        """The module's own forward, adapters switched off or merged; in tiles too where no gradient is wanted (the
        reference of preference pairs), or it would have a higher peak than training.
        """
        if torch.is_grad_enabled():
            return self.plain(x)
        x2 = x.reshape(-1, x.shape[-1])  # [t, D]
        out = torch.empty_like(x2)
        for rows in tiles_of(len(x2), self.tile_tokens):
            out[rows] = self.plain(x2[rows])
        return out.view(x.shape)


class _Tiled(torch.autograd.Function):
    """y = down(act(gate(x)) * up(x)), or down(act(up(x))), row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Kept | None, spec: _Spec, *tensors: Weight) -> Tensor:
        """x [.., D] -> [.., D]. `tensors`: W, bias, A, B of gate, up and down."""
        x2 = x.reshape(-1, x.shape[-1])  # [t, D]

        def compute() -> tuple[Tensor, Tensor]:
            whole = [dense(t) for t in tensors]  # once, not in each tile
            first, second = whole[: spec.split], whole[spec.split :]
            out = torch.empty_like(x2)
            for rows in tiles_of(len(x2), spec.tile_tokens):
                *made, _ = linears_forward(x2[rows], spec.scales[0], first)
                out[rows] = linears_forward(spec.combine(*made), spec.scales[1], second)[0]
            return out, x2.new_empty(0)

        out, _ = computed_once(kept, compute)
        save(ctx, [x2.detach()], tensors)  # see `ours_alone`
        ctx.spec = spec
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        """Gradients of x and of whatever is trained, a tile at a time."""
        x2, *tensors = map(dense, saved(ctx))
        spec: _Spec = ctx.spec
        first, second = tensors[: spec.split], tensors[spec.split :]
        needed = ctx.needs_input_grad[3:]
        dy = dout.reshape(x2.shape)
        # Over the input, where a norm made it for this MLP alone; a shared expert's is read by the router too.
        dx = (x2 if ours_alone(x2) else torch.empty_like(x2)) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(tensors)
        for rows in tiles_of(len(x2), spec.tile_tokens):
            *leaves, xa = linears_forward(x2[rows], spec.scales[0], first)
            for leaf in leaves:
                leaf.requires_grad_()
            with torch.enable_grad():
                product = spec.combine(*leaves)  # [tile, I]
            c = product.detach()
            dc, grads = linears_backward(
                [dy[rows]], c, low_rank(c, second), spec.scales[1], second, (True, *needed[spec.split :])
            )
            add_tile(sums, grads, spec.split)
            del c
            dleaves = torch.autograd.grad(product, leaves, dc)
            del product, dc, leaves, leaf
            dpart, grads = linears_backward(
                dleaves, x2[rows], xa, spec.scales[0], first, (dx is not None, *needed[: spec.split])
            )
            add_tile(sums, grads, 0)
            if dx is not None and dpart is not None:
                dx[rows] = dpart
            del dleaves, dpart, grads
        return (dx.view(dout.shape) if dx is not None else None, None, None, *rounded(sums, tensors))


def tile_mlp(layer: nn.Module, groups: Sequence[LinearGroup], tile_tokens: int) -> TiledMlp | None:
    """Tile the MLP of a decoder layer whose linears are fused; None where the layer has none of that form."""
    by_name = {group.names: group for group in groups}
    gate_up = by_name.get(("gate_proj", "up_proj")) or by_name.get(("up_proj",))
    down = by_name.get(("down_proj",))
    if gate_up is None or down is None:
        return None
    for module in layer.modules():
        ours = (getattr(module, name, None) for name in (*gate_up.names, *down.names))
        if all(a is b for a, b in zip(ours, (*gate_up.modules, *down.modules), strict=True)):
            return TiledMlp(module, gate_up, down, tile_tokens) if _is_plain(module, gate_up, down) else None
    return None


def _is_plain(mlp: nn.Module, gate_up: LinearGroup, down: LinearGroup) -> bool:
    """Whether the module computes down(act(gate(x)) * up(x)), or down(act(up(x))), and nothing else: others of these
    names have a norm (BitNet), limits or dropout (Seed-OSS) in between, or weights in their activation (Apertus), whose
    gradients would be lost. Seen by calling it with stubs for its linears, whose weights ZeRO-3 may have partitioned.
    """
    first: list[Callable[[Tensor], Tensor]] = [lambda x: 1.5 * x, lambda x: x - 0.25][: len(gate_up.modules)]
    stubs: list[Callable[[Tensor], Tensor]] = [*first, lambda x: x]
    modules, training = (*gate_up.modules, *down.modules), mlp.training
    of_linears = {id(weight) for module in modules for weight in module.parameters()}
    if any(id(weight) not in of_linears for weight in mlp.parameters()):
        return False
    forwards = [module.forward for module in modules]
    device = torch.device(get_accelerator().current_device_name())  # liger knows no other; weights may wait elsewhere
    x = torch.linspace(-40, 40, 3 * gate_up.members[0].base.out_features).view(1, 3, -1).to(device)
    try:
        mlp.train()
        for module, stub in zip(modules, stubs, strict=True):
            module.forward = stub
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            ours = _combine(mlp, gated=len(first) == 2)(*(stub(x) for stub in first))
            return torch.allclose(mlp.forward(x), ours, rtol=1e-3, atol=1e-3)  # liger's exp is not torch's
    except (AttributeError, RuntimeError):  # another activation's name, or a weight in between that is partitioned
        return False
    finally:
        mlp.train(training)
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward


def _combine(mlp: nn.Module, *, gated: bool) -> Combine:
    """act(gate) * up as the module computes it: liger's kernels in its modules, else two operations; act(up)."""
    of_liger = {"LigerSwiGLUMLP": "LigerSiLUMulFunction", "LigerGEGLUMLP": "LigerGELUMulFunction"}
    if (name := of_liger.get(type(mlp).__name__)) is not None:
        from liger_kernel import ops

        return getattr(ops, name).apply
    act: Any = mlp.act_fn
    return (lambda gate, up: act(gate) * up) if gated else act
