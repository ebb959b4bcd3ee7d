"""The forward of each kind of layer with a state, on tokens that are spread over ranks.

Each calls the layer's own modules in the order of its own forward: projections on this rank's tokens, all heads; the
exchange; convolution and recurrence over whole documents, this rank's heads; the exchange back; norms, gates and the
output projection on this rank's tokens. Parameters of a head are read by the rank that has the head, and get no
gradient from the others: the engine's sum over ranks is theirs.

Letters: s tokens of this rank, S of the pack, D hidden, H heads, G groups of heads, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_longft.sequence.exchange import HeadShare
from ds_longft.sequence.state.recurrence import (
    causal_conv,
    decayed_attention,
    gated_delta,
    kimi_delta,
    selective_scan,
    wide,
)
from ds_longft.sequence.state.spread import NextTokens, Spread


def gated_delta_net(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """Qwen3-Next, Qwen3.5, OLMo-Hybrid: x [1, s, D] -> [1, s, D]."""
    q, k, v, b, a, z = _delta_projections(layer, x[0])
    shares = spread.deal(layer.num_v_heads, layer.num_k_heads, type(layer).__name__)
    mine, dk, dv = shares[spread.rank], layer.head_k_dim, layer.head_v_dim
    ranges = [(_by(r.kv, dk), _by(r.kv, dk), _by(r.q, dv), r.q, r.q) for r in shares]
    q, k, v, b, a = spread.to_heads((q, k, v, b, a), ranges)  # [S, c]
    offsets = (0, layer.key_dim, 2 * layer.key_dim)
    q, k, v = _convolved(layer, (q, k, v), offsets, ranges[spread.rank][:3], spread)
    heads = slice(mine.q.start, mine.q.stop)
    g = -wide(layer.A_log[heads]).exp() * F.softplus(wide(a) + layer.dt_bias[heads])  # [S, h]
    beta = b.sigmoid() * (2.0 if getattr(layer, "allow_neg_eigval", False) else 1.0)
    q, k = (_as_read(t.unflatten(1, (-1, dk)), mine) for t in (q, k))  # [S, g, dk]
    out = gated_delta(layer, q, k, v.unflatten(1, (-1, dv)), g, beta, spread.documents, spread.carried)  # [S, h, dv]
    out = spread.to_tokens(out.flatten(1), [_by(r.q, dv) for r in shares])  # [s, H dv]
    norm, project = (layer.norm, layer.out_proj) if hasattr(layer, "out_proj") else (layer.o_norm, layer.o_proj)
    out = norm(out.reshape(-1, dv), z.reshape(-1, dv)).view(1, len(z), -1)
    projected: Tensor = project(out)
    return projected


def _delta_projections(layer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """x [s, D] -> q, k, v, b, a, z [s, C], as each family has them."""
    if hasattr(layer, "in_proj_qkvz"):
        parts = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x[None]), layer.in_proj_ba(x[None]))
        q, k, v, z, b, a = (t[0].flatten(1) for t in parts)
        return q, k, v, b, a, z
    if hasattr(layer, "in_proj_qkv"):
        q, k, v = layer.in_proj_qkv(x).split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
        return q, k, v, layer.in_proj_b(x), layer.in_proj_a(x), layer.in_proj_z(x)
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    return q, k, v, layer.b_proj(x), layer.a_proj(x), layer.g_proj(x)


def kimi_delta_attention(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """Kimi-Linear: a decay for each feature of a head."""
    x2, d, forget = x[0], layer.head_dim, layer.forget_gate
    q, k, v = layer.q_proj(x2), layer.k_proj(x2), layer.v_proj(x2)  # [s, H d]
    raw, b = forget.f_b_proj(forget.f_a_proj(x2)), layer.b_proj(x2)
    shares = spread.deal(layer.num_heads, layer.num_heads, type(layer).__name__)
    mine = shares[spread.rank]
    own = _by(mine.q, d)
    ranges = [(*[_by(r.q, d)] * 4, r.q) for r in shares]
    q, k, v, raw, b = spread.to_heads((q, k, v, raw, b), ranges)  # [S, c]
    q, k, v = _convolved(layer, (q, k, v), (0, layer.qkv_dim, 2 * layer.qkv_dim), [own] * 3, spread)
    q, k, v, raw = (t.unflatten(1, (-1, d)) for t in (q, k, v, wide(raw) + forget.dt_bias[own.start : own.stop]))
    rate = wide(forget.A_log.flatten()[mine.q.start : mine.q.stop]).exp()[:, None]
    g = -rate * F.softplus(raw)  # [S, h, d]
    out = kimi_delta(layer, q, k, v, g, b.sigmoid(), spread.documents, spread.carried)
    out = spread.to_tokens(out.flatten(1), [_by(r.q, d) for r in shares])  # [s, H d]
    gate = layer.g_b_proj(layer.g_a_proj(x2))
    out = layer.o_norm(out.unflatten(1, (-1, d)), gate.unflatten(1, (-1, d)))
    projected: Tensor = layer.o_proj(out.reshape(1, len(x2), -1))
    return projected


def mamba2(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """Nemotron-H, Granite-4-H, Bamba, Falcon-H1."""
    scaled = hasattr(layer, "ssm_in_multiplier")  # Falcon-H1
    projected = layer.in_proj(x * layer.ssm_in_multiplier if scaled else x)[0]
    if scaled:
        projected = projected * layer.mup_vector.flatten()
    inner, p, n = layer.intermediate_size, layer.head_dim, layer.ssm_state_size
    state = layer.n_groups * n
    z, xs, b, c, dt = projected.split([inner, inner, state, state, layer.num_heads], -1)  # [s, C]
    shares = spread.deal(layer.num_heads, layer.n_groups, type(layer).__name__)
    mine = shares[spread.rank]
    ranges = [(_by(r.q, p), _by(r.kv, n), _by(r.kv, n), r.q) for r in shares]
    xs, b, c, dt = spread.to_heads((xs, b, c, dt), ranges)  # [S, c]
    xs, b, c = _convolved(layer, (xs, b, c), (0, inner, inner + state), ranges[spread.rank][:3], spread)
    heads = slice(mine.q.start, mine.q.stop)
    dt = F.softplus(wide(dt) + layer.dt_bias[heads]).clamp(*layer.time_step_limit)  # [S, h]
    xs = xs.unflatten(1, (-1, p))  # [S, h, p]
    b, c = (_as_read(t.unflatten(1, (-1, n)), mine) for t in (b, c))  # [S, g, n]
    values = (wide(xs) * dt[..., None]).to(xs.dtype)
    g = -wide(layer.A_log[heads]).exp() * dt  # [S, h]
    out = decayed_attention(c, b, values, g, spread.documents, spread.carried)  # [S, h, p]
    out = out + (xs * layer.D[heads, None]).to(out.dtype)
    out = spread.to_tokens(out.flatten(1), [_by(r.q, p) for r in shares])[None]  # [1, s, H p]
    out = layer.norm(out, z[None]) if getattr(layer, "mamba_rms_norm", True) else out * F.silu(z)[None]
    projected = layer.out_proj(out.to(x.dtype))
    return projected


def mamba1(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """Jamba: steps, B and C mix the convolution's channels, so that one comes first, with a halo."""
    xs, z = layer.in_proj(x)[0].chunk(2, -1)  # [s, C]
    xs = _convolved_with_halo(xs, layer.conv1d, layer.activation, spread)
    rank, n = layer.time_step_rank, layer.ssm_state_size
    dt, b, c = layer.x_proj(xs).split([rank, n, n], -1)
    dt, b, c = layer.dt_layernorm(dt), layer.b_layernorm(b), layer.c_layernorm(c)
    dt = F.linear(dt, layer.dt_proj.weight)  # as in the layer's own forward: its bias is added in float32
    shares = spread.deal(layer.intermediate_size, layer.intermediate_size, type(layer).__name__)
    channels = slice(shares[spread.rank].q.start, shares[spread.rank].q.stop)
    every = range(n)
    xs, dt, b, c = spread.to_heads((xs, dt, b, c), [(r.q, r.q, every, every) for r in shares])  # [S, c], [S, N]
    dt = F.softplus(wide(dt) + layer.dt_proj.bias[channels])
    a = -wide(layer.A_log[channels]).exp()
    out = selective_scan(wide(xs), dt, a, wide(b), wide(c), spread.documents, spread.carried)
    out = (out + xs * layer.D[channels]).to(x.dtype)
    out = spread.to_tokens(out, [r.q for r in shares]) * F.silu(z)
    projected: Tensor = layer.out_proj(out[None])
    return projected


def short_convolution(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """LFM2: no state but the convolution's; a halo is all it needs of other ranks."""
    b, c, xs = layer.in_proj(x)[0].chunk(3, -1)  # [s, D]
    out: Tensor = layer.out_proj((c * _convolved_with_halo(b * xs, layer.conv, None, spread))[None])
    return out


def lightning_attention(layer: Any, x: Tensor, spread: Spread) -> tuple[Tensor, None]:
    """MiniMax: a fixed decay for each head. Returns what its attention does: output and weights."""
    qkv = layer.act_fn(layer.qkv_proj(x))[0]  # [s, H 3 d]
    heads, d = layer.num_attention_heads, layer.head_dim
    shares = spread.deal(heads, heads, type(layer).__name__)
    mine = shares[spread.rank]
    (qkv,) = spread.to_heads((qkv,), [(_by(r.q, 3 * d),) for r in shares])
    q, k, v = qkv.unflatten(1, (-1, 3 * d)).split(d, -1)  # [S, h, d]
    slope = wide(layer.slope_rate.flatten()[mine.q.start : mine.q.stop])
    out = decayed_attention(q, k, v, (-slope).expand(len(q), -1), spread.documents, spread.carried)
    out = layer.norm(spread.to_tokens(out.flatten(1), [_by(r.q, d) for r in shares])[None])
    return layer.out_proj(torch.sigmoid(layer.output_gate(x)) * out), None


def _by(heads: range, width: int) -> range:
    """The channels of these heads."""
    return range(heads.start * width, heads.stop * width)


def _as_read(t: Tensor, share: HeadShare) -> Tensor:
    """[S, groups received, d] -> [S, g, d], so that head i reads group i // (heads / g)."""
    if share.repeat is None:
        return t
    groups = t.unbind(1)  # not an index: its gradient would be summed by atomics, in another order each time
    return torch.stack([groups[i] for i in share.repeat], 1)


def _convolved(
    layer: Any, tensors: Sequence[Tensor], offsets: Sequence[int], channels: Sequence[range], spread: Spread
) -> list[Tensor]:
    """[S, c] each, convolved with their channels of the layer's convolution, where parts begin at `offsets`."""
    weight, bias, outs = layer.conv1d.weight[:, 0], layer.conv1d.bias, []
    for i, (t, offset, mine) in enumerate(zip(tensors, offsets, channels, strict=True)):
        own = slice(offset + mine.start, offset + mine.stop)
        given = weight[own], None if bias is None else bias[own], layer.activation
        if isinstance(spread, NextTokens):
            outs.append(_next_of_convolution(t, given, spread, i))
            continue
        if spread.carried is not None:
            spread.carried.keep_tail(t, spread.documents, weight.shape[1] - 1, 0, None)
        outs.append(causal_conv(t, *given, spread.positions(), spread.documents))
    return outs


def _convolved_with_halo(x: Tensor, conv: Any, activation: str | None, spread: Spread) -> Tensor:
    """x [s, C] -> [s, C], all channels."""
    weight = conv.weight[:, 0]  # [C, k]
    given, before = (weight, conv.bias, activation), weight.shape[1] - 1
    if isinstance(spread, NextTokens):
        return _next_of_convolution(x, given, spread, 0)
    if spread.carried is not None:
        spread.carried.keep_tail(x, spread.documents, before, spread.rank * len(x), spread.group)
    wider, positions = spread.with_halo(x, before)
    whole = spread.documents if spread.group is None else None
    return causal_conv(wider, *given, positions, whole)[len(wider) - len(x) :]


def _next_of_convolution(
    x: Tensor, given: tuple[Tensor, Tensor | None, str | None], spread: NextTokens, which: int
) -> Tensor:
    """x [B, c] -> [B, c]: the last of k tokens of each text, none of which is the first of a document."""
    assert spread.carried is not None
    seen = spread.carried.with_tail(which, x)  # [B, k, c]
    inside = torch.full((seen.shape[0] * seen.shape[1],), seen.shape[1], device=x.device)
    return causal_conv(seen.flatten(0, 1), *given, inside, None).unflatten(0, seen.shape[:2])[:, -1]
