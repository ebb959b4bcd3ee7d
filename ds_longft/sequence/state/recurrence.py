"""Recurrences over whole documents: a convolution, delta rules, decayed linear attention, a selective scan.

On GPUs flash-linear-attention's kernels where they are installed (`pip install -e .[hybrid]`), one launch for all
documents. Elsewhere torch: of delta rules transformers' own forms, a document at a time. States start at zero in each
document. Everything a state adds up is in float32 at least.

Where answers are made, `carried` gets the state behind each document; where it has one, the tokens are the next ones of
each text, one of each.

Letters: S tokens of the pack, H heads of this rank, G groups of heads that share keys, K and V features of a head's
keys and values, C channels.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ds_longft.batch import Documents
from ds_longft.errors import ModelError
from ds_longft.sequence.state import scan
from ds_longft.sequence.state.carried import Carried
from ds_longft.sequence.state.chunk_piece import fla_refuses, piece_in_words, register_where_needed
from ds_longft.sequence.state.spread import CHUNK_TOKENS
from ds_longft.sequence.tiles import wide


def has_fla() -> bool:
    """Whether flash-linear-attention's kernels are installed."""
    return importlib.util.find_spec("fla") is not None


def kernel_in_words(heads: Iterable[tuple[str, int, int]], dtype: torch.dtype, device: torch.device) -> str:
    """What computes the states, for the line that a run starts with. `heads`: of layers with a decay for each head,
    "delta" or "decay", and the features of a head's keys and values.
    """
    if device.type != "cuda":
        return "torch (CPU)"
    if not has_fla():
        return "torch, slow (pip install -e .[hybrid] brings Triton kernels)"
    if not fla_refuses():
        return "flash-linear-attention"
    return f"flash-linear-attention, {piece_in_words(heads, dtype, device)}"


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, positions: Tensor,
    documents: Documents | None,
) -> Tensor:  # fmt: skip
    """Depthwise: each channel of a token from its document's last k tokens.

    x [n, C], weight [C, k], positions [n]: places in the documents. `documents`: of exactly these tokens, where they
    are whole ones. Returns [n, C].
    """
    if on_fla(x) and documents is not None and activation in (None, "silu", "swish"):
        from fla.modules.causal_conv1d import causal_conv1d

        return causal_conv1d(x[None].contiguous(), weight, bias, activation=activation, **documents.borders)[0][0]
    k, wider = weight.shape[1], wide(x)
    total = wider * weight[:, -1]
    for back in range(1, k):  # the token `back` places before, if it is of the same document
        shifted = F.pad(wider[: max(0, len(x) - back)], (0, 0, min(back, len(x)), 0))
        total = total + shifted * weight[:, k - 1 - back] * (positions >= back)[:, None]
    total = total.to(x.dtype) if bias is None else (total + bias).to(x.dtype)
    return total if activation is None else ACT2FN[activation](total)


def delta_rule(
    layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: Documents,
    carried: Carried | None = None,
) -> Tensor:  # fmt: skip
    """A gated delta rule: a decay for each head (arXiv 2412.06464), or for each feature of a key (Kimi, 2510.26692).

    q, k [S, G, K], not yet normalised, v [S, H, V], g [S, H] or [S, H, K] the decays' logarithms, beta [S, H].
    Returns [S, H, V].
    """
    if carried is not None and carried.state is not None:
        return carried.delta(q, k, v, g, beta)
    by_feature = g.dim() == 3
    how: dict[str, Any] = {"use_qk_l2norm_in_kernel": True, "output_final_state": carried is not None}
    if on_fla(q):
        if by_feature:
            from fla.ops.kda import chunk_kda as rule
        else:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule

        out, state = rule(*(t[None] for t in (q, k, v, g, beta)), **how, **documents.borders)
        if carried is not None:
            carried.keep(state)
        return out[0]
    rule = _torch_form(layer, "chunk_kimi_delta_attention" if by_feature else "torch_chunk_gated_delta_rule")
    outs, states = [], []
    q, k = (t.repeat_interleave(v.shape[1] // t.shape[1], 1) for t in (q, k))  # transformers before 5.24 does not
    for parts in zip(*(t.split(documents.lengths) for t in (q, k, v, g, beta)), strict=True):  # a document at a time
        qd, kd, vd, gd, bd = (t[None] for t in parts)
        out, state = rule(qd, kd, vd, g=gd, beta=bd, **how)
        outs.append(out[0])
        states.append(state)
    if carried is not None:
        carried.keep(torch.cat(states))
    return torch.cat(outs)


def decayed_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, documents: Documents, carried: Carried | None = None
) -> Tensor:
    """Linear attention whose state decays: Mamba-2 (q is C, k is B, v is x dt) and lightning attention.

    o_t = sum over s <= t of exp(g_{s+1} + ... + g_t) (q_t . k_s) v_s, inside each document.
    q, k [S, G, K], v [S, H, V], g [S, H] the decays' logarithms. Returns [S, H, V] in v's dtype.
    """
    if carried is not None and carried.state is not None:
        return carried.decayed(q, k, v, g)
    q, k = (t.to(v.dtype).repeat_interleave(v.shape[1] // t.shape[1], 1) for t in (q, k))
    if on_fla(v):
        from fla.ops.simple_gla import chunk_simple_gla

        out, state = chunk_simple_gla(
            q[None], k[None], v[None], g[None], scale=1.0, output_final_state=carried is not None, **documents.borders
        )
        if carried is not None:
            carried.keep(state)
        return out[0]
    outs, states = [], []
    for parts in zip(*(t.split(documents.lengths) for t in (q, k, v, g)), strict=True):
        made, state = _decayed(*(wide(t).transpose(0, 1) for t in parts))
        outs += made
        states.append(state)
    if carried is not None:
        carried.keep(states)
    return torch.cat(outs, 1).transpose(0, 1).to(v.dtype)


def _decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[list[Tensor], Tensor]:
    """One document in chunks: q, k [H, n, K], v [H, n, V], g [H, n] -> parts [H, c, V], the state [H, K, V]."""
    state, outs = torch.zeros((), dtype=v.dtype, device=v.device), []
    for qc, kc, vc, gc in zip(*(t.split(CHUNK_TOKENS, 1) for t in (q, k, v, g)), strict=True):
        total = gc.cumsum(1)  # [H, c]
        decay = (total[:, :, None] - total[:, None]).tril().exp().tril()  # [H, c, c]: from the second to the first
        out = (qc @ kc.transpose(1, 2) * decay) @ vc
        if state.dim():
            out = out + (qc * total.exp()[..., None]) @ state
        left = (total[:, -1:] - total).exp()[..., None]  # what is left of each token at the chunk's end
        state = state * total[:, -1].exp()[:, None, None] + (kc * left).transpose(1, 2) @ vc  # [H, K, V]
        outs.append(out)
    return outs, state


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, documents: Documents, carried: Carried | None = None
) -> Tensor:
    """Mamba-1, arXiv 2312.00752.

    x and dt [S, C], a [C, N] negative, b and c [S, N], all in float32 at least. Returns [S, C].
    """
    if carried is not None and carried.state is not None:
        return carried.scan(x, dt, a, b, c)
    ends = documents.cu_seqlens[1:].long() - 1 if carried is not None else documents.cu_seqlens[:0].long()
    out, states = scan.selective_scan(x, dt, a, b, c, documents.positions > 0, ends)
    if carried is not None:
        carried.keep(states)
    return out


def on_fla(t: Tensor) -> bool:
    """Whether flash-linear-attention's kernels work on this tensor."""
    if not (t.is_cuda and t.dtype != torch.float64 and has_fla()):
        return False
    register_where_needed()
    return True


def _torch_form(layer: nn.Module, name: str) -> Callable[..., Any]:
    """transformers' torch function of that name beside the layer's class; it may be wrapped to call other packages.
    Raises ModelError: this version of transformers has none.
    """
    function = getattr(sys.modules[type(layer).__module__], name, None)
    if function is None:
        raise ModelError(f"transformers has no {name} beside {type(layer).__name__}: install another version of it")
    return inspect.unwrap(function)
