"""Seconds of one optimizer step on one GPU: operations over rates, bytes over bandwidths. Formulas in docs/plan.md.

Counted: attention and matrix products (forward, recomputation, backward), LoRA's products and elementwise kernels by
the bytes they move, the exchange, gathers of ZeRO-3, host copies that do not hide behind compute, the optimizer, and
what of the host's launching all this does not hide; of pairs also the passes without a gradient. Rates are a GPU
type's (`Gpu`), times its sustained share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ds_longft.data.deal import deal_documents
from ds_longft.decide.setting import Gpu, Setting
from ds_longft.decide.simulated_step import bytes_away
from ds_longft.decide.state_time import state_seconds
from ds_longft.decide.tensors import BEFORE_STATE, GROUPS, Keep, Sizes, bytes_of_layers
from ds_longft.decide.what_is_kept import disk_bytes, segment_starts
from ds_longft.model.facts import ModelFacts, visible_pairs
from ds_longft.sequence.linear import folds

HOST_S = 0.015
"""Host time of a layer, forward, again and backward: Python, torch and DeepSpeed launch some 250 kernels. Small models
wait for it. From steps of 30 layers on three H100 machines: 0.38 to 0.54 s a pack, whatever is in it (SmolLM2, LoRA on
all linears and all weights, sp 1 and 2)."""

HOST_S_PER_DOCUMENT = 1.5e-4
"""What each further document adds where the attention kernel is launched once a document. An estimate."""

PER_DOCUMENT = ("cudnn",)

GROUPED = 0.7
"""Share of the rate of a large matrix product that grouped ones have, `experts.ROWS_OF_AN_EXPERT` rows each. An
estimate."""

WIDTH_OF_A_PRODUCT = 64
"""Features that a grouped product with an adapter's rank costs at least: a tile of the tensor cores. An estimate."""

WITHOUT_GRADIENT = "passes without gradient"
DISK = "waiting for the disk"

NARROW_HEADS = 0.25
"""Narrower heads use less of the tensor cores: rates fall with this power of head size / 128. From one step with heads
of 64 on an H200 (SmolLM2, 131,072 tokens, flash-attn-4)."""

WIDEST_HEADS, WIDER_HEADS = 256, 0.1
"""Wider heads (Gemma 4's of 512) go through torch's memory-efficient attention, whose rate nobody has measured: taken
to be this share of the other kernel's. A guess, and the plan says so (`plan_text.estimated`)."""

HALF_RATE_TOKENS = 600
"""Document length at which an attention kernel has half of its rate. An estimate."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what takes them; one pack on every data-parallel rank."""

    parts: dict[str, float]
    tokens: int  # of one pack
    world: int
    sp: int

    @property
    def total_s(self) -> float:
        """The step."""
        return sum(self.parts.values())

    @property
    def tokens_per_s(self) -> float:
        """All GPUs together."""
        return self.tokens * (self.world // self.sp) / self.total_s


def predict_time(model: ModelFacts, setting: Setting, gpu: Gpu, keep: Sequence[Keep]) -> StepTime:
    """Seconds of one step of one pack, with the linears that `keep` says kept.

    Of pairs in two passes everything but the optimizer happens twice, for one side of the pairs each.
    """
    x, times = setting.of_a_pass, 2 if setting.passes == "two" else 1
    forwards = layer_forwards(model, x)
    keeping = x.recompute in ("none", "keep_attention", "auto")
    again = sum(1 for k in keep if not (keeping and k.attention)) / model.layers  # layers that compute attention again
    attention_forward = 1 + again * (forwards - 1)
    attention_s = attention_forward * attention(model, x, gpu, "forward") + attention(model, x, gpu, "backward")

    moved = moved_bytes(model, x, forwards) + expert_bytes(model, x)
    parts = {
        "attention": attention_s,
        "layers with a state": state_seconds(model, x, gpu, forwards),
        "matrix products": _products(x, gpu, multiplied_weights(model, x, keep)),
        "experts": _products(x, gpu, expert_elements(model, x) / GROUPED),
        "elementwise and LoRA": moved / (gpu.memory_gb_s * 1e9),
        "exchange": _exchange(model, x, gpu, attention_forward, forwards, 1),
        "gathering weights": _gathering(model, x, gpu, min(forwards + 1, 3)),
        "dequantising": (forwards + 1) * _dequantising_s(model, x, gpu),
    }
    parts = {name: times * seconds for name, seconds in parts.items()}
    trained = model.trained_weights(x.lora_r, x.lora_experts)
    if x.offload_optimizer:  # gradients out, weights back, Adam on the host at about 5 GB/s an element's 16 bytes
        parts["optimizer"] = trained / x.world * (4 / (gpu.host_gb_s * 1e9) + 16 / 2e10)
    else:
        parts["optimizer"] = trained / (x.world if x.stage else 1) * 40 / (gpu.memory_gb_s * 1e9)
    compute_s, streamed_s = sum(parts.values()) / times, _streamed_s(model, x, gpu)
    kept_s = _kept_s(model, x, keep, gpu)
    again_s = max(1.0, forwards - 1) * streamed_s  # layers come once forward, and when they run again
    if x.base == "sharded":
        parts["gathering weights"] = times * _not_hidden(streamed_s, again_s, compute_s)
        streamed_s = again_s = 0.0
    # kept tensors leave one way while weights come the other, and come back beside them
    parts["host copies"] = times * _not_hidden(max(kept_s, streamed_s), kept_s + again_s, compute_s)
    if x.disk_gb_s:
        of_node = disk_bytes(model, x, keep) * (x.local_world or x.world)
        way_s = of_node / (x.disk_gb_s * 1e9)
        parts[DISK] = times * _not_hidden(way_s, way_s, compute_s)
    host_s = times * (forwards + 2) / 4 * _host(model, x)
    parts["waiting for the host"] = max(0.0, host_s - sum(parts.values()))
    ahead = passes_ahead(setting)
    parts[WITHOUT_GRADIENT] = times * sum(without_gradient(model, x, gpu, adapters=on) for on in ahead)
    return StepTime({k: v for k, v in parts.items() if v}, setting.tokens, x.world, x.sp)


def multiplied_weights(model: ModelFacts, x: Setting, keep: Sequence[Keep]) -> float:
    """Weights that each local token meets in the products of one pass forward, again and back; adapters apart."""
    forwards = layer_forwards(model, x)
    passes = forwards + (1 if x.lora_r is not None else 2)
    linears = passes * linear_weights(model)
    if forwards > 1 and not model.norm_after_mlp:  # the last one is not computed again for its own backward pass
        linears -= sum(_elements(kind, GROUPS[3]) * count for kind, count in model.kinds.items())
    if x.lora_r is not None:  # nothing before the first layer's projections is trained
        linears -= _elements(model.by_layer[0], (*GROUPS[0], *BEFORE_STATE))
    kept = zip(model.by_layer, keep, strict=True)
    linears -= sum(_elements(kind, group) for kind, k in kept for group in _kept_groups(k))
    return linears + model.head_weights * x.targets * (2 if x.lora_r is not None else 4)


def linear_weights(model: ModelFacts) -> int:
    """Elements of all layers' linears, experts apart."""
    return sum(kind.layer_weights * count for kind, count in model.kinds.items())


def moved_bytes(
    model: ModelFacts, x: Setting, forwards: float, *, backward: bool = True, adapters: bool = True
) -> float:
    """Read and written by all layers' elementwise kernels, and by their adapters."""
    moved = 0.0
    for kind, count in model.kinds.items():
        moved += count * elementwise_bytes(kind, Sizes(kind, x), forwards, backward=backward)
        moved += count * adapters * lora_bytes(kind, x, forwards, backward=backward)
    return moved


def expert_elements(model: ModelFacts, x: Setting, *, backward: bool = True) -> float:
    """Elements of experts that each local token meets in grouped products, of all layers: forward once, gate and up
    again in the backward pass, then gradients of inputs, and of weights that are trained. A narrow adapter's products
    cost as much as those of `WIDTH_OF_A_PRODUCT` features.
    """
    one, sides = model.expert_weights, sum(i + o for i, o in model.expert_io)
    again = one - model.hidden * model.expert_inter  # gate and up
    of_weights = one + backward * (again + one * (1 if x.lora_r is not None else 2))
    adapted = x.lora_r is not None and x.lora_experts
    # forward, x A' of all again, dy B and its product with A, gradients of A and of B
    of_adapters = max(x.lora_r or 0, WIDTH_OF_A_PRODUCT) * sides * (1 + backward * 3) if adapted else 0.0
    return model.expert_layers * model.experts_used * (of_weights + of_adapters)


def expert_bytes(model: ModelFacts, x: Setting, *, backward: bool = True) -> float:
    """Read and written by `experts._Grouped` of all layers beside its products: rows copied, gated, scaled, added."""
    adapted = x.lora_r is not None and x.lora_experts
    wide, inner = model.hidden, model.expert_inter
    per_row = (6 + 3 * adapted) * wide + (9 + 7 * adapted) * inner
    if backward:
        per_row += (7 + 5 * adapted) * wide + (20 + 9 * adapted) * inner
    return x.local_tokens * x.element_bytes * model.expert_layers * model.experts_used * per_row


def passes_ahead(setting: Setting) -> list[bool]:
    """Whether adapters are on, for each forward pass without gradient that pairs need first."""
    live = setting.reference in ("adapter_off", "model")
    return [False] * live + [True] * (setting.passes == "two")


def without_gradient(model: ModelFacts, x: Setting, gpu: Gpu, *, adapters: bool) -> float:
    """Seconds of one forward pass that keeps nothing: the reference's, or the model's own ahead of two passes."""
    moved = moved_bytes(model, x, 1, backward=False, adapters=adapters) + expert_bytes(model, x, backward=False)
    seconds = attention(model, x, gpu, "forward") + state_seconds(model, x, gpu, 1, backward=False)
    seconds += _products(x, gpu, forward_weights(model, x))
    seconds += _products(x, gpu, expert_elements(model, x, backward=False) / GROUPED)
    seconds += moved / (gpu.memory_gb_s * 1e9) + _dequantising_s(model, x, gpu)
    seconds += _exchange(model, x, gpu, 1, 1, 0) + _gathering(model, x, gpu, 1)
    return max(seconds, _host(model, x) / 4, _streamed_s(model, x, gpu))


def forward_weights(model: ModelFacts, x: Setting) -> float:
    """Weights that each local token meets in one forward pass."""
    return linear_weights(model) + model.head_weights * x.targets


def layer_forwards(model: ModelFacts, setting: Setting) -> float:
    """How often a layer runs forward, on average: 2 with recomputation, in segments 3 but for their last layers."""
    if setting.recompute == "none":
        return 1.0
    if setting.recompute not in ("every_k", "sqrt"):
        return 2.0
    segments = len(segment_starts(model, setting))
    return (3 * model.layers - segments) / model.layers


def attention(model: ModelFacts, setting: Setting, gpu: Gpu, direction: str) -> float:
    """Seconds of all layers' attention on the rank with most heads, one forward or backward pass.

    Forward 4 operations a pair of tokens, head and head feature, backward 10 (five products).
    """
    heads = -(-model.q_heads // setting.sp)
    per_pair = (4 if direction == "forward" else 10) * heads
    share = gpu.sustained.get(f"attention_{direction}", 1.0)
    table = gpu.attention_tflops[setting.kernel][direction]
    counts: dict[int, int] = {}
    for length in setting.lengths:
        counts[length] = counts.get(length, 0) + 1
    kinds: dict[tuple[int | None, int], int] = {}
    for kind in model.attentions:
        kinds[kind] = kinds.get(kind, 0) + 1
    seconds = 0.0
    for (window, d), layers in kinds.items():
        narrow = WIDER_HEADS if d > WIDEST_HEADS else min(1.0, d / 128) ** NARROW_HEADS
        for length, documents in counts.items():
            work = per_pair * d * visible_pairs(length, window) * documents * layers
            seconds += work / (rate_at(table, min(length, window or length)) * 1e12 * share * narrow)
    return seconds


def rate_at(table: Sequence[Sequence[float]], tokens: int) -> float:
    """TFLOP/s at a document length: linear in log(tokens) between the measured lengths.

    Below the shortest of them it falls as n / (n + HALF_RATE_TOKENS), above the longest it stays.
    """
    points = sorted((float(n), float(rate)) for n, rate in table)
    if tokens <= points[0][0]:
        shortest, rate = points[0]
        return rate * tokens / (tokens + HALF_RATE_TOKENS) * (shortest + HALF_RATE_TOKENS) / shortest
    for (n0, r0), (n1, r1) in pairwise(points):
        if tokens <= n1:
            return r0 + (r1 - r0) * math.log(tokens / n0) / math.log(n1 / n0)
    return points[-1][1]


def elementwise_bytes(model: ModelFacts, z: Sizes, forwards: float, *, backward: bool = True) -> float:
    """Read and written by a layer's norms, rotary embedding, activation and residual adds."""
    forth = 2 * 2 * z.u + 2 * 3 * z.u + 3 * z.f + 2 * (z.q + z.k)
    back = 2 * 3 * z.u + 2 * 3 * z.u + 5 * z.f + 2 * (z.q + z.k)
    wide = 1 if z.setting.fused else 2.5  # float32 copies of transformers' own norm and rotary embedding
    return wide * (forwards * forth + backward * back)


def lora_bytes(model: ModelFacts, x: Setting, forwards: float, *, backward: bool = True) -> float:
    """`linear._Linears`: x A' reads the input, adding reads and writes the output; backward reads dy twice and x once,
    and adds to dx. Where the term is folded into the product, its input is copied instead.
    """
    if x.lora_r is None:
        return 0.0
    tokens, per_token = min(x.local_tokens, x.tile_tokens or x.local_tokens), 0.0
    alone = [(name,) for name, _, _ in model.linear_io if model.state and all(name not in group for group in GROUPS)]
    for group in (*GROUPS, *alone):
        shapes = [(i, o) for name, i, o in model.linear_io if name in group]
        if not shapes:
            continue
        inner, outer = shapes[0][0], sum(o for _, o in shapes)
        per_token += forwards * (inner + 2 * (inner if folds(tokens, inner, outer) else outer))
        folded = len(shapes) == 1 and folds(tokens, outer, inner)
        per_token += backward * (2 * outer + inner + 2 * (outer if folded else inner))
    return x.local_tokens * x.element_bytes * per_token


def _products(x: Setting, gpu: Gpu, weights: float) -> float:
    """Seconds of the matrix products of a rank's tokens with N weights."""
    return 2 * x.local_tokens * weights / (gpu.gemm_tflops * 1e12 * gpu.sustained.get("gemm", 1.0))


def _host(model: ModelFacts, x: Setting) -> float:
    """Seconds the host takes to launch one pack: forward 1/4, recomputation 1/4, backward 2/4."""
    further = len(x.lengths) - 1 if x.kernel in PER_DOCUMENT else 0
    return (HOST_S + HOST_S_PER_DOCUMENT * further) * model.layers


def _exchange(model: ModelFacts, x: Setting, gpu: Gpu, forwards: float, state_forwards: float, backward: int) -> float:
    """What goes to the other ranks and comes from them, read and written on both ends: of attention q, k, v and the
    output, back also the outputs' gradients; of layers with a state what their recurrence reads and puts out.
    """
    if x.sp == 1 or dealt_whole(model, x):
        return 0.0
    total = 0.0
    for kind, count in model.kinds.items():
        z = Sizes(kind, x)
        total += count * (forwards * (z.send + z.q) + backward * (2 * z.send + 2 * z.q))
        if z.state is not None:
            total += count * (state_forwards + backward) * (z.state.given + z.state.out)
    return total * (x.sp - 1) / x.sp / (gpu.all_to_all_gb_s * 1e9) + 4 * total / (gpu.memory_gb_s * 1e9)


def dealt_whole(model: ModelFacts, x: Setting) -> bool:
    """Whether the loader deals the pack's documents whole to the ranks (`data.deal`): nothing is exchanged then."""
    cost_tokens = model.equal_cost_tokens(lora=x.lora_r is not None)
    return not x.pairs and deal_documents(np.array(x.lengths), x.sp, x.local_tokens, cost_tokens) is not None


def _kept_groups(keep: Keep) -> list[tuple[str, ...]]:
    kept = (keep.qkv, keep.o, keep.gate_up, keep.state)
    return [g for g, where in zip((*GROUPS[:3], BEFORE_STATE), kept, strict=True) if where]


def _elements(model: ModelFacts, names: tuple[str, ...]) -> int:
    return sum(i * o for n, i, o in model.linear_io if n in names)


def _gathering(model: ModelFacts, x: Setting, gpu: Gpu, passes: float) -> float:
    """ZeRO-3: released weights come once a pass; from the host, if they lie there. Nothing hidden is counted off."""
    if x.stage < 3 or (not x.offload_params and (x.resident or x.world == 1)):
        return 0.0
    weights = model.weights - (model.layers_weights if x.quantize else 0)
    whole = x.element_bytes * weights * passes
    seconds = whole * (x.world - 1) / x.world / (gpu.all_gather_gb_s * 1e9)
    return seconds + (whole / x.world / (gpu.host_gb_s * 1e9) if x.offload_params else 0.0)


def _dequantising_s(model: ModelFacts, x: Setting, gpu: Gpu) -> float:
    """Seconds in which all packed weights are made dense once: codes read, weights written and read by their product's
    copy beside adapters' columns.
    """
    packed = bytes_of_layers(model, x)
    return (packed + 2 * x.element_bytes * model.layers_weights) / (gpu.memory_gb_s * 1e9) if x.quantize else 0.0


def _streamed_s(model: ModelFacts, x: Setting, gpu: Gpu) -> float:
    """Seconds in which all layers' frozen weights come once from where they lie; 0 where they are on the GPU."""
    size = bytes_of_layers(model, x)
    if x.base == "sharded":
        return size * (x.world - 1) / x.world / (gpu.all_gather_gb_s * 1e9)
    return size / (gpu.host_gb_s * 1e9) if x.base == "host" else 0.0


def _kept_s(model: ModelFacts, x: Setting, keep: Sequence[Keep], gpu: Gpu) -> float:
    """Seconds in which what is kept on the host goes there, or comes back."""
    of_kinds = {kind: Sizes(kind, x) for kind in model.kinds}
    size = sum(sum(bytes_away(of_kinds[kind], k)) for kind, k in zip(model.by_layer, keep, strict=True))
    return size / (gpu.host_gb_s * 1e9)


def _not_hidden(forward_s: float, backward_s: float, compute_s: float) -> float:
    """What of copies does not hide behind compute, of which the forward pass is a third."""
    return max(0.0, forward_s - compute_s / 3) + max(0.0, backward_s - compute_s * 2 / 3)
