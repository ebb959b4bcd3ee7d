"""Stand-ins for flash-linear-attention 0.6.0: functions that make the tensors which its own make, and nothing else.

Which ones: `ops/gated_delta_rule/chunk.py`, `ops/simple_gla/chunk.py`, `ops/common/` and `modules/causal_conv1d.py`
there. The package itself under fake tensors, its kernels left out, gives the same peaks to 1 %.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ds_longft.sequence.state import recurrence
from ds_longft.sequence.state.spread import CHUNK_TOKENS


class Convolution(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def _states(v: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    return v.new_empty(1, -(-v.shape[1] // CHUNK_TOKENS), v.shape[2], features, v.shape[3], dtype=dtype)


class Delta(torch.autograd.Function):
    """Gated delta rule: q, k [1, S, G, K], v [1, S, H, V]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        q, k, a = torch.empty_like(q), torch.empty_like(k), v.new_empty(1, v.shape[1], v.shape[2], CHUNK_TOKENS)
        w, u = v.new_empty(*v.shape[:3], k.shape[3]), torch.empty_like(v)
        h, v_new, out = _states(v, k.shape[3], v.dtype), torch.empty_like(v), torch.empty_like(v)
        ctx.save_for_backward(q, k, v, g, beta, a)
        del w, u, h, v_new
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, g, beta, _ = ctx.saved_tensors
        do = do.contiguous()
        wide = (*v.shape[:3], k.shape[3])
        w, u = v.new_empty(wide), torch.empty_like(v)
        h, v_new, dv = _states(v, k.shape[3], v.dtype), torch.empty_like(v), torch.empty_like(v)
        dh, dv2 = _states(v, k.shape[3], v.dtype), torch.empty_like(v)
        del dv
        dq, dk, dw = v.new_empty(wide), v.new_empty(wide), v.new_empty(wide)
        dq, dk = _of_groups(dq, k.shape[2]), _of_groups(dk, k.shape[2])
        dk2, dv3 = v.new_empty(wide), torch.empty_like(v)
        dk2 = _of_groups(dk2, k.shape[2])
        del w, u, h, v_new, dh, dv2, dw, dk2
        return torch.empty_like(q), torch.empty_like(k), dv3, torch.empty_like(g), torch.empty_like(beta)


def _of_groups(t: Tensor, groups: int) -> Tensor:
    return t if t.shape[2] == groups else t.unflatten(2, (groups, -1)).sum(3)


class Decayed(torch.autograd.Function):
    """`chunk_simple_gla`: q, k [1, S, H, K], v [1, S, H, V]; states in float32 in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        ctx.save_for_backward(q, k, v, g)
        h = _states(v, k.shape[3], v.dtype)
        out = torch.empty_like(v)
        del h
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, g = ctx.saved_tensors
        do = do.contiguous()
        h, dh = (_states(v, k.shape[3], torch.float32) for _ in "hd")
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(g)
        del h, dh
        return grads


def like_fla(stack: ExitStack) -> None:
    """Inside of the stack, recurrences run on these."""
    modules = {
        "fla.modules.causal_conv1d": {"causal_conv1d": lambda x, *_, **__: (Convolution.apply(x), None)},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": lambda *t, **_: (Delta.apply(*t), None)},
        "fla.ops.simple_gla": {"chunk_simple_gla": lambda *t, **_: (Decayed.apply(*t), None)},
    }
    packages = {name: SimpleNamespace() for name in ("fla", "fla.modules", "fla.ops")}
    made = {name: SimpleNamespace(**functions) for name, functions in modules.items()}
    stack.enter_context(patch.dict(sys.modules, {**packages, **made}))  # type: ignore[dict-item]
    stack.enter_context(patch.object(recurrence, "on_fla", lambda _: True))
