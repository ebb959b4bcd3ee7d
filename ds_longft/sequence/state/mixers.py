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
from ds_longft.sequence.state.gated_norm import gated_norm
from ds_longft.sequence.state.recurrence import causal_conv, decayed_attention, delta_rule, selective_scan
from ds_longft.sequence.state.spread import SCAN_COPIES, Heads, NextTokens, Spread, by_width
from ds_longft.sequence.state.work_in_pieces import by_tiles
from ds_longft.sequence.tiles import wide


def gated_delta_net(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """Qwen3-Next, Qwen3.5, OLMo-Hybrid: x [1, s, D] -> [1, s, D]."""
    tensors, widths, z = _delta_projections(layer, x[0])
    dk, dv = layer.head_k_dim, layer.head_v_dim

    def reads(share: HeadShare) -> tuple[range, ...]:
        return by_width(share.kv, dk), by_width(share.kv, dk), by_width(share.q, dv), share.q, share.q

    heads = Heads(layer.num_v_heads, layer.num_k_heads, reads, dv, dk * dv)

    def work(mine: HeadShare, q: Tensor, k: Tensor, v: Tensor, b: Tensor, a: Tensor) -> Tensor:
        offsets = (0, layer.key_dim, 2 * layer.key_dim)
        q, k, v = _convolved(layer, (q, k, v), offsets, heads.reads(mine)[:3], spread)
        own = slice(mine.q.start, mine.q.stop)
        g = -wide(layer.A_log[own]).exp() * F.softplus(wide(a) + layer.dt_bias[own])  # [S, h]
        beta = b.sigmoid() * (2.0 if getattr(layer, "allow_neg_eigval", False) else 1.0)
        q, k = (_as_read(t.unflatten(1, (-1, dk)), mine) for t in (q, k))  # [S, g, dk]
        v = v.unflatten(1, (-1, dv))  # [S, h, dv]
        return delta_rule(layer, q, k, v, g, beta, spread.documents, spread.carried).flatten(1)

    out = spread.by_heads(layer, heads, work, tensors, widths)  # [s, H dv]
    norm, project = (layer.norm, layer.out_proj) if hasattr(layer, "out_proj") else (layer.o_norm, layer.o_proj)
    return project(gated_norm(norm, out, z)[None])


def _delta_projections(layer: Any, x: Tensor) -> tuple[Sequence[Tensor], Sequence[tuple[int, ...]], Tensor]:
    """x [s, D] -> tensors that hold q, k, v, b, a side by side [s, C], their widths, and z, as each family has them."""
    keys, values, heads = (layer.key_dim,), (layer.value_dim,), (layer.num_v_heads,)
    apart = [keys, keys, values, heads, heads]
    if hasattr(layer, "in_proj_qkvz"):
        parts = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x[None]), layer.in_proj_ba(x[None]))
        q, k, v, z, b, a = (t[0].flatten(1) for t in parts)
        return (q, k, v, b, a), apart, z
    if hasattr(layer, "in_proj_qkv"):
        tensors = layer.in_proj_qkv(x), layer.in_proj_b(x), layer.in_proj_a(x)
        return tensors, [keys + keys + values, heads, heads], layer.in_proj_z(x)
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    return (q, k, v, layer.b_proj(x), layer.a_proj(x)), apart, layer.g_proj(x)


def kimi_delta_attention(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """Kimi-Linear: a decay for each feature of a head."""
    x2, d, forget, count = x[0], layer.head_dim, layer.forget_gate, layer.num_heads
    q, k, v = layer.q_proj(x2), layer.k_proj(x2), layer.v_proj(x2)  # [s, H d]
    raw, b = forget.f_b_proj(forget.f_a_proj(x2)), layer.b_proj(x2)
    heads = Heads(count, count, lambda r: (*[by_width(r.q, d)] * 4, r.q), d, d * d)

    def work(mine: HeadShare, q: Tensor, k: Tensor, v: Tensor, raw: Tensor, b: Tensor) -> Tensor:
        own = by_width(mine.q, d)
        q, k, v = _convolved(layer, (q, k, v), (0, layer.qkv_dim, 2 * layer.qkv_dim), [own] * 3, spread)
        q, k, v, raw = (t.unflatten(1, (-1, d)) for t in (q, k, v, wide(raw) + forget.dt_bias[own.start : own.stop]))
        rate = wide(forget.A_log.flatten()[mine.q.start : mine.q.stop]).exp()[:, None]
        g = -rate * F.softplus(raw)  # [S, h, d]
        return delta_rule(layer, q, k, v, g, b.sigmoid(), spread.documents, spread.carried).flatten(1)

    out = spread.by_heads(layer, heads, work, (q, k, v, raw, b))  # [s, H d]
    return layer.o_proj(gated_norm(layer.o_norm, out, layer.g_b_proj(layer.g_a_proj(x2)))[None])


def mamba2(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """Nemotron-H, Granite-4-H, Bamba, Falcon-H1."""
    scaled = hasattr(layer, "ssm_in_multiplier")  # Falcon-H1
    projected = layer.in_proj(x * layer.ssm_in_multiplier if scaled else x)[0]
    if scaled:
        projected = projected * layer.mup_vector.flatten()
    inner, p, n = layer.intermediate_size, layer.head_dim, layer.ssm_state_size
    state = layer.n_groups * n
    z, xs, bc, dt = projected.split([inner, inner, 2 * state, layer.num_heads], -1)  # [s, C]

    def reads(share: HeadShare) -> tuple[range, ...]:
        return by_width(share.q, p), by_width(share.kv, n), by_width(share.kv, n), share.q

    heads = Heads(layer.num_heads, layer.n_groups, reads, p, n * p)

    def work(mine: HeadShare, xs: Tensor, b: Tensor, c: Tensor, dt: Tensor) -> Tensor:
        xs, b, c = _convolved(layer, (xs, b, c), (0, inner, inner + state), heads.reads(mine)[:3], spread)
        own = slice(mine.q.start, mine.q.stop)
        dt = F.softplus(wide(dt) + layer.dt_bias[own]).clamp(*layer.time_step_limit)  # [S, h]
        xs = xs.unflatten(1, (-1, p))  # [S, h, p]
        b, c = (_as_read(t.unflatten(1, (-1, n)), mine) for t in (b, c))  # [S, g, n]
        values = (xs * dt[..., None]).to(xs.dtype)  # in float32: steps are
        g = -wide(layer.A_log[own]).exp() * dt  # [S, h]
        out = decayed_attention(c, b, values, g, spread.documents, spread.carried)  # [S, h, p]
        return (out + (xs * layer.D[own, None]).to(out.dtype)).flatten(1)

    tensors, widths = (xs, bc, dt), ((inner,), (state, state), (layer.num_heads,))
    out = spread.by_heads(layer, heads, work, tensors, widths)  # [s, H p]
    if getattr(layer, "mamba_rms_norm", True):
        out = gated_norm(layer.norm, out, z)
    else:
        out = by_tiles(lambda out, z: out * F.silu(z), [], out, z)
    projected = layer.out_proj(out[None].to(x.dtype))
    return projected


def mamba1(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """Jamba: steps, B and C mix the convolution's channels, so that one comes first, with a halo."""
    xs, z = layer.in_proj(x)[0].chunk(2, -1)  # [s, C]
    xs = _convolved_with_halo(xs, layer.conv1d, layer.activation, spread)
    rank, n = layer.time_step_rank, layer.ssm_state_size
    dt, b, c = layer.x_proj(xs).split([rank, n, n], -1)
    dt, b, c = layer.dt_layernorm(dt), layer.b_layernorm(b), layer.c_layernorm(c)
    dt = F.linear(dt, layer.dt_proj.weight)  # as in the layer's own forward: its bias is added in float32
    channels, every = layer.intermediate_size, range(n)
    heads = Heads(channels, channels, lambda r: (r.q, r.q, every, every), 1, SCAN_COPIES)

    def work(mine: HeadShare, xs: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        own = slice(mine.q.start, mine.q.stop)
        dt = F.softplus(wide(dt) + layer.dt_proj.bias[own])  # [S, c]
        a = -wide(layer.A_log[own]).exp()
        out = selective_scan(wide(xs), dt, a, wide(b), wide(c), spread.documents, spread.carried)
        return (out + xs * layer.D[own]).to(xs.dtype)

    out = spread.by_heads(layer, heads, work, (xs, dt, b, c)) * F.silu(z)
    return layer.out_proj(out[None])


def short_convolution(layer: Any, x: Tensor, spread: Spread) -> Tensor:
    """LFM2: no state but the convolution's; a halo is all it needs of other ranks."""
    b, c, xs = layer.in_proj(x)[0].chunk(3, -1)  # [s, D]
    return layer.out_proj((c * _convolved_with_halo(b * xs, layer.conv, None, spread))[None])


def lightning_attention(layer: Any, x: Tensor, spread: Spread) -> tuple[Tensor, None]:
    """MiniMax: a fixed decay for each head. Returns what its attention does: output and weights."""
    qkv = layer.act_fn(layer.qkv_proj(x))[0]  # [s, H 3 d]
    count, d = layer.num_attention_heads, layer.head_dim
    heads = Heads(count, count, lambda r: (by_width(r.q, 3 * d),), d, d * d)

    def work(mine: HeadShare, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(1, (-1, 3 * d)).split(d, -1)  # [S, h, d]
        slope = wide(layer.slope_rate.flatten()[mine.q.start : mine.q.stop])
        return decayed_attention(q, k, v, (-slope).expand(len(q), -1), spread.documents, spread.carried).flatten(1)

    out, norm = spread.by_heads(layer, heads, work, (qkv,)), layer.norm
    gate = layer.output_gate(x)[0]
    gated = by_tiles(lambda out, g: torch.sigmoid(g) * norm.forward(out), list(norm.parameters()), out, gate)
    return layer.out_proj(gated[None]), None


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
        outs.append(causal_conv(t, *given, spread.documents.positions, spread.documents))
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
