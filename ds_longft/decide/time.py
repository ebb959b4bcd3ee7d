"""Seconds of one optimizer step on one GPU: operations over rates, bytes over bandwidths. Formulas in docs/plan.md.

Counted: attention and matrix products (forward, recomputation, backward), LoRA's products and elementwise kernels by
the bytes they move, the exchange, gathers of ZeRO-3, host copies that do not hide behind compute, the optimizer, and
what of the host's launching all this does not hide; of pairs also the passes without a gradient. Rates are a GPU
type's (`Gpu`), times its sustained share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ds_longft.data.deal import deal_documents
from ds_longft.decide.setting import Gpu, Setting
from ds_longft.decide.state_time import state_seconds
from ds_longft.decide.tensors import Keep, Sizes, bytes_of_layers
from ds_longft.decide.what_is_kept import bytes_elsewhere
from ds_longft.decide.work import expert_elements, forward_weights, layer_forwards, moved_bytes, multiplied_weights
from ds_longft.model.facts import ModelFacts, visible_pairs

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

    parts = {
        "attention": attention_s,
        "layers with a state": state_seconds(model, x, gpu, forwards),
        "matrix products": _products(x, gpu, multiplied_weights(model, x, keep)),
        "experts": _products(x, gpu, expert_elements(model, x) / GROUPED),
        "elementwise and LoRA": moved_bytes(model, x, forwards) / (gpu.memory_gb_s * 1e9),
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
    kept_s = bytes_elsewhere(model, x, keep) / (gpu.host_gb_s * 1e9)  # goes there, or comes back
    again_s = max(1.0, forwards - 1) * streamed_s  # layers come once forward, and when they run again
    if x.base == "sharded":
        parts["gathering weights"] = times * _not_hidden(streamed_s, again_s, compute_s)
        streamed_s = again_s = 0.0
    # kept tensors leave one way while weights come the other, and come back beside them
    parts["host copies"] = times * _not_hidden(max(kept_s, streamed_s), kept_s + again_s, compute_s)
    if x.disk_gb_s:
        of_node = bytes_elsewhere(model, x, keep, ("disk",)) * (x.local_world or x.world)
        way_s = of_node / (x.disk_gb_s * 1e9)
        parts[DISK] = times * _not_hidden(way_s, way_s, compute_s)
    host_s = times * (forwards + 2) / 4 * _host(model, x)
    parts["waiting for the host"] = max(0.0, host_s - sum(parts.values()))
    ahead = passes_ahead(setting)
    parts[WITHOUT_GRADIENT] = times * sum(without_gradient(model, x, gpu, adapters=on) for on in ahead)
    return StepTime({k: v for k, v in parts.items() if v}, setting.tokens, x.world, x.sp)


def passes_ahead(setting: Setting) -> list[bool]:
    """Whether adapters are on, for each forward pass without gradient that pairs need first."""
    live = setting.reference in ("adapter_off", "model")
    return [False] * live + [True] * (setting.passes == "two")


def without_gradient(model: ModelFacts, x: Setting, gpu: Gpu, *, adapters: bool) -> float:
    """Seconds of one forward pass that keeps nothing: the reference's, or the model's own ahead of two passes."""
    moved = moved_bytes(model, x, 1, backward=False, adapters=adapters)
    seconds = attention(model, x, gpu, "forward") + state_seconds(model, x, gpu, 1, backward=False)
    seconds += _products(x, gpu, forward_weights(model, x))
    seconds += _products(x, gpu, expert_elements(model, x, backward=False) / GROUPED)
    seconds += moved / (gpu.memory_gb_s * 1e9) + _dequantising_s(model, x, gpu)
    seconds += _exchange(model, x, gpu, 1, 1, 0) + _gathering(model, x, gpu, 1)
    return max(seconds, _host(model, x) / 4, _streamed_s(model, x, gpu))


def attention(model: ModelFacts, setting: Setting, gpu: Gpu, direction: str) -> float:
    """Seconds of all layers' attention on the rank with most heads, one forward or backward pass.

    Forward 4 operations a pair of tokens, head and head feature, backward 10 (five products).
    """
    heads = -(-model.q_heads // setting.sp)
    per_pair = (4 if direction == "forward" else 10) * heads
    share = gpu.sustained.get(f"attention_{direction}", 1.0)
    table = gpu.attention_tflops[setting.kernel][direction]
    counts, seconds = Counter(setting.lengths), 0.0
    for (window, d), layers in Counter(model.attentions).items():
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
    cost_tokens = model.equal_cost_tokens(lora=x.lora_r is not None)
    if x.sp == 1 or (not x.pairs and deal_documents(np.array(x.lengths), x.sp, x.local_tokens, cost_tokens)):
        return 0.0  # one rank, or documents that the loader deals whole to the ranks
    total = 0.0
    for kind, count in model.kinds.items():
        z = Sizes(kind, x)
        total += count * (forwards * (z.send + z.q) + backward * (2 * z.send + 2 * z.q))
        if z.state is not None:
            total += count * (state_forwards + backward) * (z.state.given + z.state.out)
    return total * (x.sp - 1) / x.sp / (gpu.all_to_all_gb_s * 1e9) + 4 * total / (gpu.memory_gb_s * 1e9)


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


def _not_hidden(forward_s: float, backward_s: float, compute_s: float) -> float:
    """What of copies does not hide behind compute, of which the forward pass is a third."""
    return max(0.0, forward_s - compute_s / 3) + max(0.0, backward_s - compute_s * 2 / 3)
