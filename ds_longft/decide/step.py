"""The tensors of one step on the fullest rank, in the order the code makes and frees them.

Every function follows one piece of the package (named in its docstring); docs/plan.md has the same as formulas.
Letters: s tokens of a rank, S of the pack, D hidden, I MLP width, d head size, e bytes of an element, r LoRA rank.
Sizes in bytes: U = s D e (a hidden state), Q = s Hq d e, K = s Hkv d e, F = s I e.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from ds_longft.decide.setting import ModelSizes, Setting
from ds_longft.decide.timeline import Timeline
from ds_longft.sequence.exchange import deal_heads
from ds_longft.sequence.kept import LEAVING
from ds_longft.sequence.linear import folds
from ds_longft.sequence.loss import CHUNK_BYTES

LAYER_INPUTS, ATTENTION, LINEARS = "layer inputs", "kept attention", "kept linears"
WEIGHTS, TRAINABLE, WORK, HEAD = "weights", "gradients and optimizer", "working set", "head and loss"
REFERENCE = "reference model"
TRANSIT = "to and from the host"

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

_OF_A_LAYER = (
    "norm1", "norm1 x32", "norm1 narrow", "q", "k", "v", "qkv a", "h1", "norm2", "norm2 x32", "norm2 narrow",
    "gate", "up", "silu", "c", "gate_up a", "o a", "down a",
)  # fmt: skip


@dataclass(frozen=True)
class Keep:
    """Where a layer's tensors wait for its backward pass: "device", "host", or "" for not at all."""

    qkv: str = ""
    o: str = ""
    gate_up: str = ""
    attention: str = "device"  # read by the policies that keep it
    input: str = "device"


@dataclass
class Sizes:
    """Bytes of a rank's tensors, for the rank with the most heads."""

    model: ModelSizes
    setting: Setting
    u: float = field(init=False)
    q: float = field(init=False)
    k: float = field(init=False)
    f: float = field(init=False)
    a: float = field(init=False)  # x A' of one linear: s r e
    qs: float = field(init=False)  # [S, h, d]: this rank's query heads of the whole pack
    ks: float = field(init=False)  # [S, hk, d] as the kernel reads them
    kr: float = field(init=False)  # [S, hk, d] as received
    send: float = field(init=False)  # q, k, v for all ranks
    lse: float = field(init=False)  # [h, S] float32
    turns: int = field(init=False)  # in which attention works through its heads
    turn: float = field(init=False)  # share of the heads in one of them
    tile: float = field(init=False)  # share of the tokens in one MLP tile; 0: no tiles
    wide: bool = field(init=False)  # some kv head lies on two ranks
    repeated: bool = field(init=False)  # this rank's kv heads are repeated for the kernel

    def __post_init__(self) -> None:
        m, x = self.model, self.setting
        s, big_s, e = x.local_tokens, x.tokens, x.element_bytes
        self.u, self.f = s * m.hidden * e, s * m.inter * e
        self.q, self.k = s * m.q_heads * m.head_dim * e, s * m.kv_heads * m.head_dim * e
        self.a = s * (x.lora_r or 0) * e
        shares = deal_heads(m.q_heads, m.kv_heads, x.sp)
        most = max(shares, key=lambda share: (len(share.q), len(share.repeat or share.kv)))
        unit = big_s * m.head_dim * e
        self.qs, self.ks, self.kr = unit * len(most.q), unit * len(most.repeat or most.kv), unit * len(most.kv)
        self.send = s * m.head_dim * e * sum(len(p.q) + 2 * len(p.kv) for p in shares)
        self.lse = big_s * len(most.q) * 4
        heads = max(len(share.kv) for share in shares)
        self.turns = -(-heads // x.kv_heads) if x.kv_heads else 1
        self.turn = min(1.0, (x.kv_heads or heads) / heads)
        self.wide = any(b.kv.start < a.kv.stop for a, b in pairwise(shares))
        self.tile = min(1.0, x.tile_tokens / s) if x.tile_tokens else 0.0
        self.repeated = most.repeat is not None

    def group(self, names: tuple[str, ...]) -> float:
        """Outputs of a group of linears and their x A': what keeping it costs (`LinearGroup.out_features`)."""
        x = self.setting
        outs = [o for name, _, o in self.model.linear_io if name in names]
        return x.local_tokens * x.element_bytes * (sum(outs) + len(outs) * (x.lora_r or 0))

    def beside(self, share: float = 1.0) -> float:
        """Copies of dy and W with the low-rank columns, for down's gradient of its input (`linear.folds`)."""
        m, x = self.model, self.setting
        tokens = round(share * x.local_tokens)
        if x.lora_r is None or not folds(tokens, m.hidden, m.inter):
            return 0.0
        return (m.hidden + x.lora_r) * (tokens + m.inter) * x.element_bytes

    def kernel_backward(self) -> float:
        """Float32 workspace of an attention kernel's backward pass, beside dq, dk and dv (kernels' sources)."""
        rows = self.qs / self.setting.element_bytes / self.model.head_dim  # S h
        dq = 2 * self.qs * 2 / self.setting.element_bytes  # float32 sums of dq
        grouped = self.qs != self.ks
        if self.setting.kernel in ("varlen", "flash-attn-2"):  # dk and dv for every query head, summed afterwards
            return dq + 4 * rows + (2 * self.qs if grouped else 0.0)
        return dq + 8 * rows + (4 * self.ks * 2 / self.setting.element_bytes if grouped else 0.0)


@dataclass
class Step:
    """Holds and drops on a timeline what one step holds and drops."""

    t: Timeline
    z: Sizes
    keep: tuple[Keep, ...]

    def run(self) -> None:
        """Embedding, layers, head, and back."""
        t, z, x = self.t, self.z, self.z.setting
        layers = z.model.layers
        t.hold("cos sin", 2 * x.local_tokens * z.model.head_dim * x.element_bytes)  # arguments of every layer
        t.hold("leaving", max(sum(sorted(self._on_host(k))[-LEAVING:]) for k in self.keep), TRANSIT)
        self._input(0)
        if x.recompute in ("every_k", "sqrt"):
            self._segments(x.every if x.recompute == "every_k" else max(1, round(layers**0.5)))
            return
        for i in range(layers):
            self._forward(i, saving=x.recompute == "none", first=True)
        self._head()
        for i in reversed(range(layers)):
            if x.recompute != "none":
                self._forward(i, saving=True, first=False)
            self._backward(i)

    def _on_host(self, keep: Keep) -> list[float]:
        """Bytes of what waits on the host of one layer, and of another one (`kept.HostStore`)."""
        z = self.z
        places = (keep.qkv, keep.o, keep.gate_up, keep.attention, keep.input)
        sizes = (*(z.group(names) for names in GROUPS[:3]), z.q + z.lse, z.u)
        return 2 * [size for place, size in zip(places, sizes, strict=True) if place == "host"]

    def _input(self, i: int) -> None:
        """The input of layer i; one that waits on the host is counted as in transit."""
        away = i < len(self.keep) and self.keep[i].input == "host"
        self.t.hold(f"x{i}", 0.0 if away else self.z.u, LAYER_INPUTS)

    def _segments(self, size: int) -> None:
        """`recompute._Segment`: inputs of segments, then of one segment's layers (nested checkpoints)."""
        t, layers = self.t, self.z.model.layers
        starts = list(range(0, layers, size))
        for start in starts:
            for i in range(start, min(start + size, layers)):
                self._forward(i, saving=False, first=True)
                if i > start:
                    t.drop(f"x{i}")
        self._head()
        if self.keep[0].input == "host":  # torch holds the one before until the next segment is recomputed
            t.hold("input of the segment before", self.z.u, TRANSIT)
        for start in reversed(starts):
            last = min(start + size, layers) - 1
            for i in range(start, last):  # the segment again; its last layer keeps its tensors at once
                t.drop(f"x{i + 1}")
                self._forward(i, saving=False, first=True)
            for i in range(last, start - 1, -1):
                self._forward(i, saving=True, first=False)
                self._backward(i)

    def _norm(self, name: str, saving: bool) -> None:
        """Liger keeps its input (held already) and one float a token; transformers works in float32."""
        t, u = self.t, self.z.u
        if self.z.setting.fused:
            t.hold(name, u, at="a norm")
            return
        wide = 4 / self.z.setting.element_bytes * u
        t.hold(f"{name} x32", wide)
        t.during(f"{name} square", wide)
        t.hold(f"{name} y32", wide)
        if not saving:
            t.drop(f"{name} x32")
        t.hold(f"{name} narrow", u)
        t.hold(name, u, at="a norm in float32")
        t.drop(f"{name} y32")
        if not (saving and self.z.setting.lora_r is None):  # kept for the gradient of the norm's weight
            t.drop(f"{name} narrow")

    def _norm_backward(self, name: str) -> None:
        """In place with liger; float32 temporaries without."""
        t = self.t
        if not self.z.setting.fused:
            wide = 4 / self.z.setting.element_bytes * self.z.u
            t.during(f"{name} backward", (2.0 if name == "final norm" else 4.5) * wide)
        t.drop(f"{name} x32", f"{name} narrow")

    def _forward(self, i: int, *, saving: bool, first: bool) -> None:
        """One decoder layer. `saving`: autograd keeps what it needs. `first`: not a recomputation."""
        t, z, x, keep = self.t, self.z, self.z.setting, self.keep[i]
        place = keep.attention if x.recompute in ("keep_attention", "auto") else ""
        self._norm("norm1", saving)
        self._linears(i, "qkv", keep.qkv, {"q": z.q, "k": z.k, "v": z.k}, 3 * z.a, first)
        if not x.fused:
            self._rope()
        if first or not place:
            self._attention(i, place)
        self._linears(i, "o", keep.o, {"o": z.u}, z.a, first)
        if not saving:
            t.drop("q", "k", "v", "qkv a")
        if not saving or z.tile:  # made again in the backward pass (`remade.py`)
            t.drop("norm1")
        t.hold("h1", z.u)
        t.drop("o")
        if not first and not x.fused and not z.tile:
            t.drop(f"x{i}")  # autograd has it in float32
        if not first:
            t.drop(f"kept o {i}")
        if not place and not saving:
            t.drop(f"attention {i}")
        self._norm("norm2", saving)
        if z.tile:
            self._tiled_forward(i, saving, first)
        else:
            self._mlp_forward(i, saving, first)

    def _mlp_forward(self, i: int, saving: bool, first: bool) -> None:
        """The gated MLP, whole."""
        t, z, x = self.t, self.z, self.z.setting
        self._linears(i, "gate_up", self.keep[i].gate_up, {"gate": z.f, "up": z.f}, 2 * z.a, first)
        if not x.fused:
            t.hold("silu", z.f)
            if not saving:
                t.drop("gate")
        t.hold("c", z.f, at="the MLP, forward")
        if not saving:
            t.drop("gate", "up", "silu", "gate_up a")
        if not first:  # torch stops the recomputation here, and the output takes no memory (`kept.Unread`)
            t.hold("down a", z.a, at="the MLP, forward")
            if not x.fused:
                t.drop("h1")
            return
        t.hold("down", z.u + z.a, at="the MLP, forward")
        self._input(i + 1)
        t.drop("down")
        if not saving:
            t.drop("c")
        self._end_of_layer(i, saving)

    def _tiled_forward(self, i: int, saving: bool, first: bool) -> None:
        """`mlp._Tiled.forward`; a recomputation has an output that nothing reads and that takes no memory."""
        t, z = self.t, self.z
        if not first:
            if not z.setting.fused:
                t.drop("h1")
            return
        t.hold("down", z.u)
        t.during("a tile of the MLP, forward", z.tile * ((3 if z.setting.fused else 4) * z.f + z.u))
        self._input(i + 1)
        t.drop("down")
        self._end_of_layer(i, saving)

    def _end_of_layer(self, i: int, saving: bool) -> None:
        """After a first pass; without recomputation everything of the layer stays, under its own name."""
        t = self.t
        if not saving:
            t.drop("h1", "norm2", "o a")
            return
        if not self.z.setting.fused:  # autograd has it in float32
            t.drop("h1", *([] if self.z.tile else [f"x{i}"]))
        for name in _OF_A_LAYER:
            if name in t.live:
                t.live[f"{name} of {i}"] = t.live.pop(name)

    def _linears(self, i: int, group: str, kept: str, outs: dict[str, float], a: float, first: bool) -> None:
        """`linear._Linears`: outputs, x A', and what is kept of them (`kept.py`)."""
        t = self.t
        total = sum(outs.values()) + a
        if kept and not first:  # taken: the kept storage is what the layer works on; from the host, in transit
            return
        for name, size in outs.items():
            t.hold(name, size)
        t.hold(f"{group} a", a)
        if kept != "device":
            return
        if group != "qkv":  # the same storage; q, k, v are copied, because liger rotates q and k in place
            t.drop(*outs, f"{group} a")
        t.hold(f"kept {group} {i}", total, LINEARS)

    def _rope(self) -> None:
        """transformers' rotary embedding: q cos + rotate_half(q) sin, then the same for k."""
        t, z = self.t, self.z
        for name, size in (("q", z.q), ("k", z.k)):
            t.hold(f"{name} cos", size)
            t.hold(f"{name} half", size / 2)
            t.hold(f"{name} turned", size)
            t.drop(f"{name} half")
            t.hold(f"{name} sin", size)
            t.drop(f"{name} turned")
            t.hold(f"{name} rotated", size, at="the rotary embedding")
            t.drop(f"{name} cos", f"{name} sin")
        t.drop("q rotated", "k rotated")  # they take the place of q and k

    def _attention(self, i: int, place: str) -> None:
        """`attention.SpAttention.forward`, all heads at once or in turns."""
        t, z, at = self.t, self.z, "attention, forward"
        part, turn = ATTENTION if place else WORK, z.turn
        size = 0.0 if place == "host" else z.q + z.lse  # what waits on the host is in transit
        if z.turns > 1:
            t.hold(f"attention {i}", size, part)
            t.hold("out", z.q + z.lse - size)
        if z.setting.sp > 1:
            t.hold("send", turn * z.send)
            t.hold("heads", turn * (z.qs + 2 * z.kr), at=at)
            if z.turns == 1:
                t.drop("send")
            t.hold("repeated", turn * 2 * z.ks if z.repeated else 0.0)
            t.hold("computed", turn * (z.qs + z.lse if z.turns > 1 else z.qs), at=at)
            if z.turns == 1:
                t.hold("received", z.q)
        elif z.turns > 1:
            t.during(at, turn * (z.q + z.lse))
        if z.turns == 1:
            t.hold(f"attention {i}", size, part, at=at)
        t.drop("send", "heads", "repeated", "computed", "received", "out")

    def _attention_backward(self, i: int) -> None:
        """`attention.SpAttention.backward`: exchange, kernel, exchange back; all heads at once or in turns."""
        t, z, at = self.t, self.z, "attention, backward"
        turn, many, grads = z.turn, z.setting.sp > 1, z.qs + 2 * z.ks
        if z.turns > 1:  # written over q, k and v
            t.hold("dq dk dv", 2 * z.k * 4 / z.setting.element_bytes if z.wide else 0.0)
        if many:
            t.hold("send", turn * (z.send + 2 * z.q))
            t.hold("heads", turn * (3 * z.qs + 2 * z.kr), at=at)
            t.drop("send")
            t.hold("repeated", turn * 2 * z.ks if z.repeated else 0.0)
        t.hold("grads", turn * grads, at=at)
        t.during(at, turn * z.kernel_backward())
        if z.turns > 1:
            t.during("join", turn * (z.qs + 2 * z.kr) if many else 0.0)
            t.drop("heads", "repeated", "grads")
        elif many:
            t.drop("heads", "repeated")
            t.hold("join", z.qs + 2 * z.kr)
            t.hold("received", z.send)
            t.drop("join")
            t.hold("dq dk dv", z.q + 2 * z.k, at="the exchange after attention, backward")
            t.drop("grads", "received")
        if z.turns == 1:
            t.drop("q", "k", "v")
        t.drop(f"attention {i}", "dattention")

    def _backward(self, i: int) -> None:
        """One layer's backward pass; the gradient of its output is held as "g"."""
        t, z, x = self.t, self.z, self.z.setting
        if x.recompute == "none":
            for name in _OF_A_LAYER:
                if f"{name} of {i}" in t.live:
                    t.live[name] = t.live.pop(f"{name} of {i}")
        if z.tile:
            self._tiled_backward()
        else:
            self._mlp_backward(i)
        self._norm_backward("norm2")
        t.drop("h1", "norm2", "dnorm2")  # added to g in place
        t.hold("dattention", z.q)
        self._weight_gradient("o_proj")
        t.drop("o a", f"kept o {i}")
        self._attention_backward(i)
        if z.turns == 1:
            t.drop(f"kept qkv {i}")
        if not x.fused:
            t.during("the rotary embedding, backward", 3 * z.q)
        if z.tile:
            t.during("norm1 again x32", 0.0 if x.fused else 3 * 4 / x.element_bytes * z.u)
            t.hold("norm1 again", z.u)
        t.hold("dnorm1", z.u)
        self._weight_gradient("q_proj")
        t.drop("dq dk dv", "grads", "q", "k", "v", "norm1", "norm1 again", "qkv a")
        self._norm_backward("norm1")
        t.drop("dnorm1", f"x{i}", f"kept qkv {i}")

    def _mlp_backward(self, i: int) -> None:
        """Down, the gated activation, gate and up."""
        t, z, x = self.t, self.z, self.z.setting
        t.hold("beside", z.beside())
        t.hold("dc", z.f, at="the MLP, backward")
        t.drop("beside")
        self._weight_gradient("down_proj")
        t.drop("c", "down a")
        if not x.fused:
            t.hold("dsilu", z.f)
            t.hold("dup", z.f, at="the MLP's activation, backward")
            t.drop("silu", "up", "dc")
            t.hold("dgate", z.f)
            t.drop("gate", "dsilu")
        t.drop("dc")
        t.hold("dnorm2", z.u)
        self._weight_gradient("gate_proj")
        t.drop("norm2", "gate", "up", "dgate", "dup", "gate_up a", f"kept gate_up {i}")

    def _tiled_backward(self) -> None:
        """`mlp._Tiled.backward`; gradients of weights are summed in float32."""
        t, z, x = self.t, self.z, self.z.setting
        t.hold("dnorm2", 0.0)  # written over the norm's output
        if x.lora_r is None:
            elements = sum(i * o for n, i, o in z.model.linear_io if n in (*GROUPS[2], *GROUPS[3]))
            t.hold("sums", 4 * elements, TRAINABLE)
            t.during("weight gradients of a tile", (4 + x.element_bytes) * elements * 2 / 3, TRAINABLE)
        t.during("a tile of the MLP, backward", z.tile * ((4 if x.fused else 7) * z.f + z.u) + z.beside(z.tile))
        t.drop("sums")

    def _weight_gradient(self, name: str) -> None:
        """Full training: the gradient of a group's weights, until it lies in the bucket."""
        if self.z.setting.lora_r is not None:
            return
        names = next(g for g in GROUPS if name in g)
        elements = sum(i * o for n, i, o in self.z.model.linear_io if n in names)
        self.t.during(f"weight gradient of {name}", elements * self.z.setting.element_bytes, TRAINABLE)

    def _head(self) -> None:
        """`loss.ChunkedHead`: final norm, labelled rows, chunks of logits; leaves the gradient "g"."""
        t, z, x, m = self.t, self.z, self.z.setting, self.z.model
        rows = x.targets * z.u  # hidden states of labelled rows
        self._norm("final norm", True)
        t.hold("labelled rows", rows, HEAD)
        chunk = min(CHUNK_BYTES, 4 * x.targets * x.local_tokens * m.vocab)
        logits, of_head = chunk * x.element_bytes / 4, m.head_weights * x.element_bytes
        if x.lora_r is not None:  # in one kernel the gradient takes the logits' place
            t.hold("dhidden", rows, HEAD)
            t.during("logits", 3.5 * chunk if m.capped_logits else logits, HEAD)
        else:  # the head's gradient, summed over the chunks in float32; beside it a chunk's, or the rounded sum
            t.during("logits", 2.5 * chunk if m.capped_logits else logits, HEAD)
            t.drop("final norm")
            t.hold("dhidden", rows, HEAD)
            of_chunk = max(3 * chunk, logits + of_head) if m.capped_logits else logits + of_head
            t.during("logits", 4 * m.head_weights + of_chunk, HEAD)
        t.drop("labelled rows")
        t.drop("leaving")
        t.hold("coming", max(sum(self._on_host(k)) for k in self.keep), TRANSIT)  # a layer's, and the next one's
        t.hold("g", z.u)
        t.drop("dhidden", "final norm")
        self._norm_backward("final norm")
        t.drop(f"x{m.layers}")
