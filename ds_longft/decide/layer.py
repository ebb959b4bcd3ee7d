"""One decoder layer on a timeline, forward and backward: tensors are held and dropped in the order the code does it.

Every function follows one piece of the package (named in its docstring); what mixes tokens is in `mixing.py`.
docs/plan.md has the same as formulas. Letters and sizes: `tensors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_longft.decide.mixing import attention, attention_backward, rope, state, state_backward
from ds_longft.decide.tensors import AWAY, GROUPS, LAYER_INPUTS, LINEARS, TRAINABLE, Keep, Sizes
from ds_longft.decide.timeline import Timeline

_QK_NORMS = tuple(f"{name} norm{copy}" for name in "qk" for copy in ("", " x32", " narrow"))

_OF_A_LAYER = (
    "norm1", "norm1 x32", "norm1 narrow", "q", "k", "v", "qkv a", "h1", "norm2", "norm2 x32", "norm2 narrow",
    "gate", "up", "silu", "c", "gate_up a", "o a", "down a", "routes", "projected", "state out", "normed",
    "attention gated", *_QK_NORMS,
)  # fmt: skip


@dataclass
class Layer:
    """Any layer of the model, named by its number."""

    t: Timeline
    z: Sizes
    keep: tuple[Keep, ...]

    def input(self, i: int) -> None:
        """The input of layer i; one that waits on the host is counted as in transit."""
        away = i < len(self.keep) and self.keep[i].input in AWAY
        self.t.hold(f"x{i}", 0.0 if away else self.z.u, LAYER_INPUTS)

    def norm(self, name: str, saving: bool, size: float | None = None) -> None:
        """Liger keeps its input (held already) and one float a token; transformers works in float32."""
        t, u = self.t, self.z.u if size is None else size
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

    def _qk_norm(self, saving: bool) -> None:
        """Norms of queries, then of keys, between the linears and the rotary embedding."""
        if not self.z.model.qk_norm:
            return
        for name, size in (("q norm", self.z.q), ("k norm", self.z.k)):
            self.norm(name, saving, size)
            if not (saving and self.z.setting.fused):  # its input is in float32, or gone
                self.t.drop(name)

    def norm_backward(self, name: str) -> None:
        """In place with liger; float32 temporaries without."""
        t = self.t
        if not self.z.setting.fused:
            wide = 4 / self.z.setting.element_bytes * self.z.u
            t.during(f"{name} backward", (2.0 if name == "final norm" else 4.5) * wide)
        t.drop(f"{name} x32", f"{name} narrow")

    def forward(self, i: int, *, saving: bool, first: bool) -> None:
        """One decoder layer. `saving`: autograd keeps what it needs. `first`: not a recomputation."""
        t, z, x, keep = self.t, self.z, self.z.setting, self.keep[i]
        place = keep.attention if x.recompute in ("keep_attention", "auto") else ""
        if z.model.attends or z.state:  # layers of an MLP alone have one norm (Nemotron-H)
            self.norm("norm1", saving)
        state(t, z, i, keep.state, saving=saving, first=first)
        self._linears(i, "qkv", keep.qkv, {"q": z.q + 2 * z.gate, "k": z.k, "v": z.k}, 3 * z.a, first)
        self._qk_norm(saving)
        if not x.fused:
            rope(t, z)
        if first or not place:
            attention(t, z, i, place)
        t.hold("attention gated", 2 * z.gate)  # the gate's sigmoid, and the product; queries are copied from beside it
        self._linears(i, "o", keep.o, {"o": z.u}, z.a, first)
        if not saving:
            t.drop("q", "k", "v", "qkv a", "attention gated")
        if not saving or (z.tile and z.state is None):  # made again in the backward pass (`recomputed_input.py`)
            t.drop("norm1")
        t.hold("h1", z.u if z.model.attends or z.state else 0.0)
        t.drop("o")
        if not first and not x.fused and not z.tile:
            t.drop(f"x{i}")  # autograd has it in float32
        if not first:
            t.drop(f"kept o {i}")
        if not place and not saving:
            t.drop(f"attention {i}")
        self.norm("norm2", saving)
        if z.tile:
            self._tiled_forward(i, saving, first)
        else:
            self._mlp_forward(i, saving, first)

    def _experts_forward(self, saving: bool, first: bool) -> None:
        """Router and `experts._Grouped.forward`; a recomputation has an output that takes no memory."""
        t, z = self.t, self.z
        if not z.rows:
            return
        t.hold("routes", z.routes)
        if first:
            t.hold("experts", z.u)
            t.during("the experts, forward", z.of_experts()[0])
        if not saving:
            t.drop("routes")

    def _experts_backward(self) -> None:
        """`experts._Grouped.backward`; with a trained router its input's gradient is a tensor of its own."""
        t, z, x = self.t, self.z, self.z.setting
        if not z.rows:
            return
        t.hold("of experts", z.u if x.lora_r is None else 0.0)
        t.hold("expert sums", z.expert_sums(), TRAINABLE)
        t.during("the experts, backward", max(z.of_experts()[1], z.tile_gradient()))
        t.drop("expert sums", "routes")

    def _mlp_forward(self, i: int, saving: bool, first: bool) -> None:
        """The gated MLP, whole, and experts."""
        t, z, x = self.t, self.z, self.z.setting
        self._experts_forward(saving, first)
        self._linears(i, "gate_up", self.keep[i].gate_up, {"gate": z.f, "up": z.f}, 2 * z.a, first)
        if not x.fused:
            t.hold("silu", z.f)
            if not saving:
                t.drop("gate")
        t.hold("c", z.f, at="the MLP, forward")
        if not saving:
            t.drop("gate", "up", "silu", "gate_up a")
        if not first:  # torch stops the recomputation here, and the output takes no memory (`kept.UnusedOutput`)
            t.hold("down a", z.a, at="the MLP, forward")
            if not x.fused:
                t.drop("h1")
            return
        t.hold("down", z.u + z.a if z.f else 0.0, at="the MLP, forward")
        self.input(i + 1)
        t.drop("down", "experts")
        if not saving:
            t.drop("c")
        self._end_of_layer(i, saving)

    def _tiled_forward(self, i: int, saving: bool, first: bool) -> None:
        """`mlp._Tiled.forward`; a recomputation has an output that nothing reads and that takes no memory."""
        t, z = self.t, self.z
        self._experts_forward(saving, first)
        if not first:
            if not z.setting.fused:
                t.drop("h1")
            return
        t.hold("down", z.u if z.f else 0.0)
        t.during("a tile of the MLP, forward", z.tile * ((3 if z.setting.fused else 4) * z.f + z.u) if z.f else 0.0)
        self.input(i + 1)
        t.drop("down", "experts")
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

    def backward(self, i: int) -> None:
        """One layer's backward pass; the gradient of its output is held as "g"."""
        t, z, x = self.t, self.z, self.z.setting
        if x.recompute == "none":
            for name in _OF_A_LAYER:
                if f"{name} of {i}" in t.live:
                    t.live[name] = t.live.pop(f"{name} of {i}")
        self._experts_backward()
        if z.tile:
            self._tiled_backward()
        else:
            self._mlp_backward(i)
        self.norm_backward("norm2")
        t.drop("h1", "norm2", "dnorm2", "of experts")  # added to g in place
        t.hold("dattention", z.q)
        self._weight_gradient("o_proj")
        t.drop("o a", f"kept o {i}", "attention gated")
        t.hold("dgate of attention", z.gate)
        attention_backward(t, z, i)
        state_backward(t, z, i)
        if z.turns == 1:
            t.drop(f"kept qkv {i}")
        if not x.fused:
            t.during("the rotary embedding, backward", 3 * z.q)
            if z.model.qk_norm:
                t.during("the norm of queries, backward", 4.5 * 4 / x.element_bytes * z.q)
        t.drop(*_QK_NORMS)
        if z.tile and z.state is None:
            t.during("norm1 again x32", 0.0 if x.fused else 3 * 4 / x.element_bytes * z.u)
            t.hold("norm1 again", z.u)
        t.hold("dnorm1", z.u)
        self._weight_gradient("q_proj")
        t.drop("dgate of attention")
        t.drop("dq dk dv", "dprojected", "grads", "q", "k", "v", "norm1", "norm1 again", "qkv a")
        self.norm_backward("norm1")
        t.drop("dnorm1", f"x{i}", f"kept qkv {i}")

    def _mlp_backward(self, i: int) -> None:
        """Down, the gated activation, gate and up."""
        t, z, x = self.t, self.z, self.z.setting
        t.hold("beside", z.beside())
        t.hold("dc", z.f, at="the MLP, backward")
        t.drop("beside")
        self._weight_gradient("down_proj")
        t.drop("c", "down a")
        if not z.gated:  # squares of positive parts
            t.during("the MLP's activation, backward", 2 * z.f)
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
        if not z.f:
            t.drop("sums")
            return
        wide = 4 if x.fused and z.gated else 7  # of squares: positive parts, twice, and two products
        t.during("a tile of the MLP, backward", z.tile * (wide * z.f + z.u) + z.beside(z.tile))
        t.drop("sums")

    def _weight_gradient(self, name: str) -> None:
        """Full training: the gradient of a group's weights, until it lies in the bucket."""
        if self.z.setting.lora_r is not None:
            return
        names = next(g for g in GROUPS if name in g)
        elements = sum(i * o for n, i, o in self.z.model.linear_io if n in names)
        self.t.during(f"weight gradient of {name}", elements * self.z.setting.element_bytes, TRAINABLE)
