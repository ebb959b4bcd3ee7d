"""How large the tensors of a step are on the fullest rank, and where they may wait for the backward pass.

Letters: s tokens of a rank, S of the pack, D hidden, I MLP width, d head size, e bytes of an element, r LoRA rank.
Sizes in bytes: U = s D e (a hidden state), Q = s Hq d e, K = s Hkv d e, F = s I e.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ds_longft.decide.setting import Setting
from ds_longft.model.facts import ModelFacts
from ds_longft.model.packed import FORMATS
from ds_longft.sequence.exchange import deal_heads
from ds_longft.sequence.experts import tile_of
from ds_longft.sequence.linear import folds
from ds_longft.sequence.state.scan import PIECE_TOKENS
from ds_longft.sequence.state.spread import CHUNK_TOKENS, SCAN_COPIES, turns_of
from ds_longft.sequence.state.work_in_pieces import TILE_TOKENS

LAYER_INPUTS, ATTENTION, LINEARS = "layer inputs", "kept attention", "kept linears"
WEIGHTS, TRAINABLE, WORK, HEAD = "weights", "gradients and optimizer", "working set", "head and loss"
REFERENCE = "reference model"
TRANSIT = "to and from the host"

BEFORE_STATE = (
    *("in_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "qkv_proj"),
    *("a_proj", "b_proj", "g_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "x_proj", "output_gate"),
)
"""Projections of layers with a state; of those that are named as an attention's, GROUPS says it."""

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def bytes_of_layers(model: ModelFacts, setting: Setting) -> float:
    """Frozen weights of all decoder layers as they lie: packed where they are quantised (mxfp4: the experts alone)."""
    if not setting.quantize:
        return float(setting.element_bytes * model.layers_weights)
    experts = model.expert_layers * model.experts * model.expert_weights
    packed = experts if setting.quantize == "mxfp4" else model.layers_weights
    return FORMATS[setting.quantize].bytes_per_weight * packed + setting.element_bytes * (model.layers_weights - packed)


def made_dense(model: ModelFacts, setting: Setting) -> float:
    """Bytes of the packed weights that are dense at the same time: of one linear, and its copy beside adapters'
    columns; in tiles of an MLP all of them; both stacks of a layer's experts.
    """
    if not setting.quantize:
        return 0.0
    weights = {name: i * o for name, i, o in model.linear_io}
    largest = 0 if setting.quantize == "mxfp4" else 2 * max(weights.values(), default=0)
    mlp = sum(weights.get(name, 0) for group in GROUPS[2:] for name in group)
    tiles = mlp if setting.tile_tokens and largest else 0
    return float(setting.element_bytes * max(largest, tiles, model.experts * model.expert_weights))


@dataclass(frozen=True)
class Keep:
    """Where a layer's tensors wait for its backward pass: "device", "host", "disk" (the last two), or ""
    for not at all.
    """

    qkv: str = ""
    o: str = ""
    gate_up: str = ""
    attention: str = "device"  # read by the policies that keep it
    input: str = "device"
    state: str = ""  # projections of a layer that carries a state

    @property
    def on_disk(self) -> bool:
        """Whether anything of the layer lies there."""
        return "disk" in (self.attention, self.input)


@dataclass(frozen=True)
class StateSizes:
    """Bytes of a layer that carries a state, of the rank with the most heads (`sequence/state`)."""

    projected: float  # what the projections before the recurrence put out, this rank's tokens
    given: float  # of it, what the work with heads reads: exchanged with the other ranks
    out: float  # the recurrence's output [S, h, V]
    gate: float  # of what is projected, what gates the output where it is a part of one tensor (Mamba-2)
    dgiven: float  # gradients of what is given, where they find no place in it; of B and C in float32
    saved: float  # what autograd keeps of convolution and recurrence beside these, all heads
    forward: float  # beside these while the recurrence runs: states of all chunks, keys and values of its matrix form
    backward: float  # the same while it runs backward
    turns: int  # in which this rank works on its heads

    @classmethod
    def of(cls, m: ModelFacts, x: Setting) -> StateSizes:
        """Of the kernels of flash-linear-attention 0.6.0, `chunk.py` in `fla/ops/gated_delta_rule` and `simple_gla`,
        counted tensor by tensor in tests/unit/decide/test_state_memory.py.

        Chunks have 64 tokens. A delta rule keeps normalised keys and queries and a 64 x 64 matrix a chunk; Mamba-2 keys
        and queries of every head, and has its states in float32 in the backward pass.
        """
        f, e, s = m.state, x.element_bytes, x.tokens
        assert f is not None
        named = BEFORE_STATE if m.attends else (*BEFORE_STATE, *GROUPS[0])
        outs = sum(o for name, _, o in m.linear_io if name in named)
        h, g = (-(-n // x.sp) for n in (f.heads, f.groups))
        keys, values, states = float(h * f.keys), float(h * f.values), h * f.keys * f.values / CHUNK_TOKENS
        read, wide = 2.0 * g * f.keys, 4.0 / e
        given, gate, dgiven = read + values, 0.0, 0.0
        turns = turns_of(s, f.heads, x.sp, f.keys * f.values, x.kv_heads is not None)
        if f.kind in ("delta", "kimi"):
            decays = keys if f.kind == "kimi" else 0.0  # of each feature, in float32
            given += decays
            saved = read + values + h * CHUNK_TOKENS + 2 * wide * decays
            forward = keys + 2 * values + states + read
            backward = 2 * keys + 1.5 * read + 5 * values + 2 * states + 2 * wide * decays
        elif f.kind == "decay":
            mamba = values if f.channels else 0.0  # the convolution's output, which values are made of
            saved = 2 * keys + values + mamba
            forward = states + mamba + (read if mamba else 0.0)
            backward = 2 * wide * states + 2 * keys + 2 * values
            gate, dgiven = mamba, mamba + wide * read if mamba else 0.0
        elif f.kind == "scan":  # torch: float32 copies of channels and steps; states of a piece of the tokens
            given = float(f.channels) / x.sp
            piece = wide * keys * min(1.0, PIECE_TOKENS / s)
            saved, forward, backward = 10 * given, 4 * given + 2 * piece, 6 * given + 5 * piece
            turns = turns_of(s, f.heads, x.sp, SCAN_COPIES, x.kv_heads is not None)
        else:  # torch: a convolution's float32 copies
            given = float(f.channels) / x.sp
            saved, forward, backward, turns = 2 * given, 6 * given, 8 * given, 1
        unit = float(s * e)
        return cls(
            projected=float(x.local_tokens * e * outs), given=unit * given, out=unit * values, gate=unit * gate,
            dgiven=unit * dgiven, saved=unit * saved, forward=unit * forward, backward=unit * backward, turns=turns,
        )  # fmt: skip

    def tile(self, x: Setting) -> float:
        """Float32 temporaries of a gated norm while it works on some tokens, forward; twice that backward."""
        return 4 * self.out * min(1.0, TILE_TOKENS / x.local_tokens) * 4 / x.element_bytes


AWAY = ("host", "disk")
"""Places beside the GPU."""


class Sizes:
    """Bytes of a rank's tensors, for the rank with the most heads."""

    def __init__(self, model: ModelFacts, setting: Setting) -> None:
        self.model, self.setting = m, x = model, setting
        s, big_s, e = x.local_tokens, x.tokens, x.element_bytes
        self.u, self.f = float(s * m.hidden * e), float(s * m.inter * e)
        self.q, self.k = float(s * m.q_heads * m.head_dim * e), float(s * m.kv_heads * m.head_dim * e)
        self.a = float(s * (x.lora_r or 0) * e)  # x A' of one linear
        self.state = StateSizes.of(m, x) if m.state else None  # of a layer that carries one
        shares = deal_heads(m.q_heads, m.kv_heads, x.sp)
        most = max(shares, key=lambda share: (len(share.q), len(share.repeat or share.kv)))
        unit = float(big_s * m.head_dim * e)
        self.qs = unit * len(most.q)  # [S, h, d]: this rank's query heads of the whole pack
        self.ks, self.kr = unit * len(most.repeat or most.kv), unit * len(most.kv)  # as the kernel reads, as received
        self.repeated = most.repeat is not None  # this rank's kv heads, for the kernel
        self.send = float(s * m.head_dim * e * sum(len(p.q) + 2 * len(p.kv) for p in shares))  # q, k, v for all ranks
        self.lse = float(big_s * len(most.q) * 4)  # [h, S] float32
        heads = max(len(share.kv) for share in shares)
        self.turns = -(-heads // x.kv_heads) if x.kv_heads else 1  # in which attention works through its heads
        self.turn = min(1.0, (x.kv_heads or heads) / heads)  # share of the heads in one of them
        self.wide = any(b.kv.start < a.kv.stop for a, b in pairwise(shares))  # some kv head lies on two ranks
        self.tile = min(1.0, x.tile_tokens / s) if x.tile_tokens else 0.0  # share of the tokens; 0: no MLP tiles
        outs = {name: o for name, _, o in m.linear_io}
        # Of what gates attention's output (Qwen3.5), beside the queries; 0: nothing does.
        self.gate = self.q if m.attends and outs.get("q_proj") == 2 * m.q_heads * m.head_dim else 0.0
        self.gated = "gate_proj" in outs  # the MLP
        tile = tile_of(m.experts, m.experts_used, x.tile_tokens) if m.experts else 0
        self.rows = m.experts_used * min(s, tile)  # copies of tokens in one tile of the experts; 0: a dense model
        # What a router leaves for its backward pass: float32 probabilities of all experts, indices and weights of those
        # used.
        self.routes = s * (4.0 * m.experts + 20 * m.experts_used)
        if not m.attends:
            self.q = self.k = self.qs = self.ks = self.kr = self.send = self.lse = 0.0

    def group(self, names: tuple[str, ...]) -> float:
        """Outputs of a group of linears and their x A': what keeping it costs (`LinearGroup.out_features`)."""
        x = self.setting
        outs = [o for name, _, o in self.model.linear_io if name in names and (self.state or names is not BEFORE_STATE)]
        return x.local_tokens * x.element_bytes * (sum(outs) + len(outs) * (x.lora_r or 0))

    def beside(self, share: float = 1.0) -> float:
        """Copies of dy and W with the low-rank columns, for down's gradient of its input (`linear.folds`)."""
        m, x = self.model, self.setting
        tokens = round(share * x.local_tokens)
        if x.lora_r is None or not folds(tokens, m.hidden, m.inter):
            return 0.0
        return (m.hidden + x.lora_r) * (tokens + m.inter) * x.element_bytes

    def of_experts(self) -> tuple[float, float]:
        """`experts._Grouped`. Forward: of a tile outputs twice; or rows, gate and up, and what is made of them.
        Backward: of a tile rows, gate and up, and their gradients; or rows, the outputs' gradients, and what the
        routing weights' gradient is made of.
        """
        wide, inner = (self.rows * self.setting.element_bytes * n for n in (self.model.hidden, self.model.expert_inter))
        return max(2.125 * wide, wide + 4 * inner), max(wide + 9 * inner, 2 * wide + 7 * inner)

    def expert_sums(self) -> float:
        """Float32 sums over the tiles of what is trained of a layer's experts."""
        m, x = self.model, self.setting
        if x.lora_r is None:
            return 4.0 * m.experts * m.expert_weights
        return 4.0 * m.experts * x.lora_r * sum(i + o for i, o in m.expert_io) if x.lora_experts else 0.0

    def tile_gradient(self) -> float:
        """Full training: beside a tile's rows and their gradients, the gradient of gate and up, and it in float32."""
        m, e = self.model, self.setting.element_bytes
        if self.setting.lora_r is not None:
            return 0.0
        gate_up = m.experts * (m.expert_weights - m.hidden * m.expert_inter)
        return (4 + e) * gate_up + self.rows * e * (m.hidden + 2 * m.expert_inter)

    def kernel_backward(self) -> float:
        """Float32 workspace of an attention kernel's backward pass, beside dq, dk and dv (kernels' sources)."""
        rows = self.qs / self.setting.element_bytes / self.model.head_dim  # S h
        dq = 2 * self.qs * 2 / self.setting.element_bytes  # float32 sums of dq
        grouped = self.qs != self.ks
        if self.setting.kernel in ("varlen", "flash-attn-2"):  # dk and dv for every query head, summed afterwards
            return dq + 4 * rows + (2 * self.qs if grouped else 0.0)
        return dq + 8 * rows + (4 * self.ks * 2 / self.setting.element_bytes if grouped else 0.0)


def by_layer(model: ModelFacts, setting: Setting) -> list[Sizes]:
    """Those of each layer; layers that are alike share one."""
    of_kinds = {kind: Sizes(kind, setting) for kind in model.kinds}
    return [of_kinds[kind] for kind in model.by_layer]
