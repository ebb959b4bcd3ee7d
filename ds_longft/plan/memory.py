"""Peak memory of one optimizer step on the fullest rank, tensor by tensor, in the order the code holds them.

Every function follows one piece of the package (named in its docstring); docs/plan.md has the same as formulas.
Letters: s tokens of a rank, S of the pack, D hidden, I MLP width, d head size, e bytes of an element, r LoRA rank.
Sizes in bytes: U = s D e (a hidden state), Q = s Hq d e, K = s Hkv d e, F = s I e.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_longft.plan.setting import GIB, Gpu, ModelSizes, Setting
from ds_longft.plan.timeline import Timeline
from ds_longft.sequence.exchange import deal_heads
from ds_longft.sequence.loss import CHUNK_BYTES

SPARE_SHARE = 0.06
"""Of GPU memory, never planned with: the allocator's fragments, NCCL, kernels' workspaces. As `train.speed` spends."""

MAX_LIVE_PARAMETERS = 1e9
"""ZeRO-3 keeps gathered weights up to so many elements (DeepSpeed's stage3_max_live_parameters, its default)."""

SUB_GROUP_ELEMENTS = 1e9
"""ZeRO-3 steps the optimizer on so many elements at a time (DeepSpeed's sub_group_size, its default)."""

LAYER_INPUTS, ATTENTION, LINEARS = "layer inputs", "kept attention", "kept linears"
WEIGHTS, TRAINABLE, WORK, HEAD = "weights", "gradients and optimizer", "working set", "head and loss"

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Keep:
    """Where the outputs of a layer's linear groups are kept: "device", "host", or not at all."""

    qkv: str = ""
    o: str = ""
    gate_up: str = ""


@dataclass(frozen=True)
class Memory:
    """A predicted peak, of the fullest rank."""

    peak: float  # bytes that torch has allocated at the highest moment
    moment: str  # what was being computed then
    parts: dict[str, float]  # the same bytes by what they are
    outside: float  # bytes beside torch's: CUDA context, NCCL
    host: float  # pinned host memory of this rank, bytes
    keep: tuple[Keep, ...]  # per layer

    @property
    def peak_gib(self) -> float:
        """What `torch.cuda.max_memory_allocated` is expected to say."""
        return self.peak / GIB

    def fits(self, gpu: Gpu, host_gib: float | None = None, local_world: int = 1) -> bool:
        """Within the GPU's memory less the reserve, and the node's host memory where it is given."""
        room = gpu.memory_gib * (1 - SPARE_SHARE) * GIB
        return self.peak + self.outside <= room and (host_gib is None or self.host * local_world <= host_gib * GIB)


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
        self.repeated = most.repeat is not None

    def group(self, names: tuple[str, ...]) -> float:
        """Outputs of a group of linears and their x A': what keeping it costs (`LinearGroup.out_features`)."""
        x = self.setting
        outs = [o for name, _, o in self.model.linear_io if name in names]
        return x.local_tokens * x.element_bytes * (sum(outs) + len(outs) * (x.lora_r or 0))

    def kernel_backward(self) -> float:
        """Float32 workspace of an attention kernel's backward pass, beside dq, dk and dv (kernels' sources)."""
        rows = self.qs / self.setting.element_bytes / self.model.head_dim  # S h
        dq = 2 * self.qs * 2 / self.setting.element_bytes  # float32 sums of dq
        grouped = self.qs != self.ks
        if self.setting.kernel in ("varlen", "flash-attn-2"):  # dk and dv for every query head, summed afterwards
            return dq + 4 * rows + (2 * self.qs if grouped else 0.0)
        return dq + 8 * rows + (4 * self.ks * 2 / self.setting.element_bytes if grouped else 0.0)


def predict(model: ModelSizes, setting: Setting, gpu: Gpu) -> Memory:
    """The peak of one step. With `recompute: auto` it is spent as `train.speed.Recompute.spend` does."""
    outside = (gpu.context_gib + (gpu.nccl_gib if setting.world > 1 else 0.0)) * GIB
    none = (Keep(),) * model.layers
    timeline = step_timeline(model, setting, none)
    host = host_bytes(model, setting)
    keep = none
    if setting.recompute == "auto":
        free = gpu.memory_gib * (1 - SPARE_SHARE) * GIB - outside - timeline.peak
        keep, on_host = spend(model, setting, free)
        host += on_host
        if keep != none:
            timeline = step_timeline(model, setting, keep)
    return Memory(timeline.peak, timeline.moment, timeline.at_peak, outside, host, keep)


def spend(model: ModelSizes, setting: Setting, free: float) -> tuple[tuple[Keep, ...], float]:
    """`train.speed.Recompute.spend`: which groups are kept where with `free` bytes left; bytes on this rank's host."""
    sizes = Sizes(model, setting)
    cost = {"qkv": sizes.group(GROUPS[0]), "o": sizes.group(GROUPS[1]), "gate_up": sizes.group(GROUPS[2])}
    wanted = [(i, "qkv") for i in range(model.layers)]
    wanted += [(i, name) for i in range(model.layers) for name in ("o", "gate_up")]
    allowed = setting.host_gib * GIB / (setting.local_world or setting.world)
    if allowed:
        free -= 2 * max(cost.values())
    chosen: list[dict[str, str]] = [{} for _ in range(model.layers)]
    on_device = on_host = 0.0
    for i, name in wanted:
        if cost[name] and on_device + cost[name] <= free:
            chosen[i][name] = "device"
            on_device += cost[name]
        elif name != "qkv" and cost[name] and on_host + cost[name] <= allowed:
            chosen[i][name] = "host"
            on_host += cost[name]
    return tuple(Keep(**c) for c in chosen), on_host


def host_bytes(model: ModelSizes, setting: Setting) -> float:
    """Pinned host memory of a rank for what the DeepSpeed JSON offloads."""
    trained = trained_weights(model, setting) / setting.world
    states = (12 + 4) * trained if setting.offload_optimizer else 0.0  # master, two moments, gradient, float32
    return states + (2 * model.weights / setting.world if setting.offload_params else 0.0)


def trained_weights(model: ModelSizes, setting: Setting) -> int:
    """Elements with a gradient."""
    return model.weights if setting.lora_r is None else model.lora_weights(setting.lora_r)


def fixed(model: ModelSizes, setting: Setting) -> dict[str, float]:
    """Bytes held all the time: weights, and what belongs to the trained ones (DeepSpeed 0.19.8, bf16).

    Weights 2 bytes; master and two moments 12 bytes a trained element, split over ranks from stage 1; gradients 2,
    split from stage 2; reduce buckets of 2 bytes.
    """
    e, world, trained = setting.element_bytes, setting.world, trained_weights(model, setting)
    whole = e * model.weights
    weights = whole
    if setting.stage == 3:
        own = 0.0 if setting.offload_params else whole / world
        gathered = whole if setting.resident else e * min(model.weights, MAX_LIVE_PARAMETERS)
        weights = own + gathered
    split_states = world if setting.stage >= 1 else 1
    split_gradients = world if setting.stage >= 2 else 1
    states = 0.0 if setting.offload_optimizer else 12 * trained / split_states
    gradients = 0.0 if setting.offload_optimizer else e * trained / split_gradients
    bucket = 5e6 if setting.lora_r is not None else max(5e6, model.hidden**2)
    buffers = (2 if setting.stage >= 2 else 1) * e * bucket
    if setting.lora_r is not None:
        weights += e * trained / (world if setting.stage == 3 else 1)
    return {WEIGHTS: weights, TRAINABLE: states + gradients + buffers}


def step_timeline(model: ModelSizes, setting: Setting, keep: tuple[Keep, ...]) -> Timeline:
    """Forward, backward and optimizer step of one pack."""
    t = Timeline()
    for part, size in fixed(model, setting).items():
        t.hold(part, size, part)
    step = _Step(t, Sizes(model, setting), keep)
    step.run()
    trained = trained_weights(model, setting)
    split = setting.world if setting.stage >= 1 else 1
    if not setting.offload_optimizer:  # gradients in float32 while the optimizer steps
        elements = trained / split
        t.during(
            "float32 gradients", 4 * (min(elements, SUB_GROUP_ELEMENTS) if setting.stage == 3 else elements), TRAINABLE
        )
    return t


@dataclass
class _Step:
    """The tensors of one step in the order the code makes and frees them."""

    t: Timeline
    z: Sizes
    keep: tuple[Keep, ...]

    def run(self) -> None:
        """Embedding, layers, head, and back."""
        t, z, x = self.t, self.z, self.z.setting
        layers = self.z.model.layers
        t.hold(
            "cos sin", 2 * x.local_tokens * z.model.head_dim * x.element_bytes
        )  # arguments of every layer: held to the end
        t.hold("x0", z.u, LAYER_INPUTS)
        if x.recompute in ("every_k", "sqrt"):
            size = x.every if x.recompute == "every_k" else max(1, round(layers**0.5))
            self._segments(size)
            return
        for i in range(layers):
            self._forward(i, saving=x.recompute == "none", first=True)
        self._head()
        for i in reversed(range(layers)):
            if x.recompute != "none":
                self._forward(i, saving=True, first=False)
            self._backward(i)

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
        for start in reversed(starts):
            last = min(start + size, layers) - 1
            for i in range(start, last):  # the segment again; its last layer's second call gives its graph
                t.drop(f"x{i + 1}")
                self._forward(i, saving=False, first=True)
            t.hold(f"x{last + 1} again", 0)
            self._forward_once_more(last)
            for i in range(last, start - 1, -1):
                self._forward(i, saving=True, first=False)
                self._backward(i)
            t.drop(f"x{last + 1} again")

    def _forward_once_more(self, i: int) -> None:
        """The last layer of a segment, run for its output that nobody needs."""
        self._forward(i, saving=False, first=True)
        self.t.drop(f"x{i + 1}")

    def _norm(self, name: str, saving: bool) -> None:
        """Liger keeps its input (held already) and one float a token; transformers works in float32."""
        t, u = self.t, self.z.u
        if self.z.setting.fused:
            t.hold(name, u)
            return
        wide = 4 / self.z.setting.element_bytes * u
        t.hold(f"{name} x32", wide)
        t.during(f"{name} square", wide)
        t.hold(f"{name} y32", wide)
        if not saving:
            t.drop(f"{name} x32")
        t.hold(f"{name} narrow", u)
        t.hold(name, u)
        t.drop(f"{name} y32")
        if not (saving and self.z.setting.lora_r is None):  # kept for the gradient of the norm's weight
            t.drop(f"{name} narrow")

    def _norm_backward(self, name: str) -> None:
        """In place with liger; float32 temporaries without."""
        t, u = self.t, self.z.u
        if not self.z.setting.fused:
            wide = 4 / self.z.setting.element_bytes * u
            t.during(f"{name} backward", 2 * wide)
        t.drop(f"{name} x32", f"{name} narrow")

    def _forward(self, i: int, *, saving: bool, first: bool) -> None:
        """One decoder layer. `saving`: autograd keeps what it needs. `first`: not a recomputation."""
        t, z, x, keep = self.t, self.z, self.z.setting, self.keep[i]
        keeping = x.recompute in ("keep_attention", "auto")
        self._norm("norm1", saving)
        self._linears(i, "qkv", keep.qkv, {"q": z.q, "k": z.k, "v": z.k}, 3 * z.a, first)
        if not x.fused:
            self._rope()
        if first or not keeping:
            self._attention(i, keeping)
        self._linears(i, "o", keep.o, {"o": z.u}, z.a, first)
        if not saving:
            t.drop("q", "k", "v", "qkv a", "norm1")
        t.hold("h1", z.u)
        t.drop("o")
        if not first:
            t.drop(f"kept o {i}")
        if not keeping and not saving:
            t.drop(f"attention {i}")
        self._norm("norm2", saving)
        self._linears(i, "gate_up", keep.gate_up, {"gate": z.f, "up": z.f}, 2 * z.a, first)
        if x.fused:
            t.hold("c", z.f)
        else:
            t.hold("silu", z.f)
            if not saving:
                t.drop("gate")
            t.hold("c", z.f)
        if not saving:
            t.drop("gate", "up", "silu", "gate_up a")
        t.hold("down", z.u + z.a)
        if not first:  # torch stops the recomputation here
            t.drop("down")
            t.hold("down a", z.a)
            if not x.fused:
                t.drop("h1")
            return
        t.hold(f"x{i + 1}", z.u, LAYER_INPUTS)
        t.drop("down")
        if saving and not x.fused:  # autograd has it in float32
            t.drop(f"x{i}", "h1")
        if not saving:
            t.drop("c", "h1", "norm2", "o a")
        else:  # recompute: none; everything of the layer stays, under its own name
            for name in list(t.live):
                if name in _OF_A_LAYER:
                    part, size = t.live.pop(name)
                    t.live[f"{name} of {i}"] = part, size

    def _linears(self, i: int, group: str, kept: str, outs: dict[str, float], a: float, first: bool) -> None:
        """`linear._Linears`: outputs, x A', and what is kept of them (`kept.py`)."""
        t = self.t
        total = sum(outs.values()) + a
        if kept and not first:  # taken: the kept storage is what the layer works on
            if kept == "host":
                t.hold(f"kept {group} {i}", total)
            return
        for name, size in outs.items():
            t.hold(name, size)
        t.hold(f"{group} a", a)
        if not kept:
            return
        if kept == "host":  # two on their way out
            t.drop(f"leaving {i - 2} {group}")
            t.hold(f"leaving {i} {group}", 0.0)
            return
        if group == "qkv":  # a copy: liger rotates q and k in place
            t.hold(f"kept {group} {i}", total, LINEARS)
            return
        for name in (*outs, f"{group} a"):  # the same storage, now kept
            t.drop(name)
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
            t.hold(f"{name} rotated", size)
            t.drop(f"{name} cos", f"{name} sin")
        t.drop("q rotated", "k rotated")  # they take the place of q and k

    def _attention(self, i: int, keeping: bool) -> None:
        """`attention.SpAttention.forward`."""
        t, z = self.t, self.z
        part = ATTENTION if keeping else WORK
        if z.setting.sp == 1:
            t.hold(f"attention {i}", z.q + z.lse, part)
            return
        t.hold("send", z.send)
        t.hold("heads", z.qs + 2 * z.kr)
        t.drop("send")
        if z.repeated:
            t.hold("repeated", 2 * z.ks)
        t.hold("out", z.qs)
        t.hold("received", z.q)
        t.hold(f"attention {i}", z.q + z.lse, part)
        t.drop("out", "received", "heads", "repeated")

    def _attention_backward(self, i: int) -> None:
        """`attention.SpAttention.backward`: exchange, kernel, exchange back."""
        t, z = self.t, self.z
        grads = z.qs + 2 * z.ks
        if z.setting.sp == 1:
            t.hold("dq dk dv", grads)
            t.during("kernel", z.kernel_backward())
        else:
            t.hold("send", z.send + 2 * z.q)
            t.hold("heads", 3 * z.qs + 2 * z.kr)
            t.drop("send")
            if z.repeated:
                t.hold("repeated", 2 * z.ks)
            t.hold("grads", grads)
            t.during("kernel", z.kernel_backward())
            t.drop("heads", "repeated")
            t.hold("join", z.qs + 2 * z.kr)
            t.hold("received", z.send)
            t.hold("dq dk dv", z.q + 2 * z.k)
            t.drop("grads", "join", "received")
        t.drop("q", "k", "v", f"attention {i}", "dattention")

    def _backward(self, i: int) -> None:
        """One layer's backward pass; the gradient of its output is held as "g"."""
        t, z, x = self.t, self.z, self.z.setting
        if x.recompute == "none":
            for name in _OF_A_LAYER:
                if f"{name} of {i}" in t.live:
                    t.live[name] = t.live.pop(f"{name} of {i}")
        kept = f"kept gate_up {i}"
        t.hold("dc", z.f)
        self._weight_gradient("down_proj")
        t.drop("c", "down a")
        if not x.fused:
            t.hold("dsilu", z.f)
            t.hold("dup", z.f)
            t.drop("silu", "up", "dc")
            t.hold("dgate", z.f)
            t.drop("gate", "dsilu")
        t.drop("dc")
        t.hold("dnorm2", z.u)
        self._weight_gradient("gate_proj")
        t.drop("norm2", "gate", "up", "dgate", "dup", "gate_up a", kept)
        self._norm_backward("norm2")
        t.drop("h1", "dnorm2")  # added to g in place
        t.hold("dattention", z.q)
        self._weight_gradient("o_proj")
        t.drop("o a", f"kept o {i}")
        self._attention_backward(i)
        t.drop(f"kept qkv {i}")
        if not x.fused:
            t.during("rope backward", 3 * z.q)
        t.hold("dnorm1", z.u)
        self._weight_gradient("q_proj")
        t.drop("dq dk dv", "norm1", "qkv a")
        self._norm_backward("norm1")
        t.drop("dnorm1", f"x{i}")

    def _weight_gradient(self, name: str) -> None:
        """Full training: the gradient of a group's weights, until it lies in the bucket."""
        if self.z.setting.lora_r is not None:
            return
        names = next(g for g in GROUPS if name in g)
        elements = sum(i * o for n, i, o in self.z.model.linear_io if n in names)
        self.t.during(f"{name} weight gradient", elements * self.z.setting.element_bytes, TRAINABLE)

    def _head(self) -> None:
        """`loss.ChunkedHead`: final norm, labelled rows, chunks of logits; leaves the gradient "g"."""
        t, z, x, m = self.t, self.z, self.z.setting, self.z.model
        rows = x.targets * z.u  # hidden states of labelled rows
        self._norm("final norm", True)
        t.hold("labelled rows", rows, HEAD)
        chunk = min(CHUNK_BYTES, 4 * x.targets * x.local_tokens * m.vocab)
        if x.lora_r is not None:
            t.hold("dhidden", rows, HEAD)
            t.during("logits", 3.5 * chunk, HEAD)
            t.drop("labelled rows")
        else:
            weight = m.head_weights * x.element_bytes
            t.during("logits", max(3 * chunk + weight, 3 * weight), HEAD)  # summed over chunks: old, new, sum
            t.hold("dhidden", rows, HEAD)
            t.drop("labelled rows")
        t.hold("g", z.u)
        t.drop("dhidden", "final norm")
        self._norm_backward("final norm")
        t.drop(f"x{m.layers}")


_OF_A_LAYER = (
    "norm1", "norm1 x32", "norm1 narrow", "q", "k", "v", "qkv a", "h1", "norm2", "norm2 x32", "norm2 narrow",
    "gate", "up", "silu", "c", "gate_up a", "o a", "down a",
)  # fmt: skip
