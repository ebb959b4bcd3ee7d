"""Seconds of one optimizer step on one GPU: operations over rates, bytes over bandwidths. Formulas in docs/plan.md.

Counted: attention and matrix products (forward, recomputation, backward), LoRA's products and elementwise kernels by
the bytes they move, the exchange, gathers of ZeRO-3, host copies that do not hide behind compute, the optimizer. Rates
are a GPU type's (`Gpu`), times its sustained share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ds_longft.model.flops import visible_pairs
from ds_longft.plan.memory import segment_starts, trained_weights
from ds_longft.plan.setting import Gpu, ModelSizes, Setting
from ds_longft.plan.step import GROUPS, Keep, Sizes

KERNEL_LAUNCHES_S = 1.5e-4
"""A layer's call: launches that nothing hides when the tensors are small, forward and backward together, per document
for kernels that are launched once a document. An estimate."""

PER_DOCUMENT = ("cudnn",)


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


def predict_time(model: ModelSizes, setting: Setting, gpu: Gpu, keep: Sequence[Keep]) -> StepTime:
    """Seconds of one step of one pack, with the linears that `keep` says kept."""
    x, z = setting, Sizes(model, setting)
    forwards = layer_forwards(model, x)
    keeping = x.recompute in ("none", "keep_attention", "auto")
    again = sum(1 for k in keep if not (keeping and k.attention)) / model.layers  # layers that compute attention again
    extra = _extra_forward(x)
    attention_forward = 1 + again * (forwards - 1) + extra
    attention_s = attention_forward * attention(model, x, gpu, "forward") + attention(model, x, gpu, "backward")

    rate = gpu.gemm_tflops * 1e12 * gpu.sustained.get("gemm", 1.0)
    s = x.local_tokens
    passes = forwards + extra + (1 if x.lora_r is not None else 2)
    linears = passes * model.layer_weights * model.layers
    if forwards > 1 and not model.norm_after_mlp:  # the last one is not computed again for its own backward pass
        linears -= _elements(model, GROUPS[3]) * model.layers
    linears -= sum(_elements(model, group) for k in keep for group in _kept_groups(k))
    head = model.head_weights * x.targets * (2 + extra if x.lora_r is not None else 4)
    linear_s = 2 * s * (linears + head) / rate

    moved = elementwise_bytes(model, z, forwards) * model.layers
    moved += lora_bytes(model, x, forwards) * model.layers
    parts = {
        "attention": attention_s,
        "matrix products": linear_s,
        "elementwise and LoRA": moved / (gpu.memory_gb_s * 1e9),
        "launches": KERNEL_LAUNCHES_S * model.layers * (len(x.lengths) if x.kernel in PER_DOCUMENT else 1),
    }
    if x.sp > 1:
        away = (x.sp - 1) / x.sp
        forward = z.send + z.q
        backward = z.send + 2 * z.q + z.send
        exchanged = (attention_forward * forward + backward) * away * model.layers
        copies = 2 * (attention_forward * forward + backward) * 2 * model.layers  # read and written, both ways
        parts["exchange"] = exchanged / (gpu.all_to_all_gb_s * 1e9) + copies / (gpu.memory_gb_s * 1e9)
    if x.world > 1 or x.offload_params:
        parts["gathering weights"] = _gathering(model, x, gpu, forwards)
    trained = trained_weights(model, x)
    if x.offload_optimizer:  # gradients out, weights back, Adam on the host at about 5 GB/s an element's 16 bytes
        parts["optimizer"] = trained / x.world * (4 / (gpu.host_gb_s * 1e9) + 16 / 2e10)
    else:
        parts["optimizer"] = trained / (x.world if x.stage else 1) * 40 / (gpu.memory_gb_s * 1e9)
    parts["host copies"] = _host_copies(model, z, keep, sum(parts.values()), gpu)
    return StepTime({k: v for k, v in parts.items() if v}, x.tokens, x.world, x.sp)


def layer_forwards(model: ModelSizes, setting: Setting) -> float:
    """How often a layer runs forward, on average: 2 with recomputation, in segments 3 but for their last layers."""
    if setting.recompute == "none":
        return 1.0
    if setting.recompute not in ("every_k", "sqrt"):
        return 2.0
    segments = len(segment_starts(model, setting))
    return (3 * model.layers - segments) / model.layers


def _extra_forward(setting: Setting) -> int:
    """DPO's reference: the same pack once more without gradient."""
    return 1 if setting.objective == "dpo" else 0


def attention(model: ModelSizes, setting: Setting, gpu: Gpu, direction: str) -> float:
    """Seconds of all layers' attention on the rank with most heads, one forward or backward pass.

    Forward 4 operations a pair of tokens, head and head feature, backward 10 (five products).
    """
    heads = -(-model.q_heads // setting.sp)
    per_pair = (4 if direction == "forward" else 10) * heads * model.head_dim
    share = gpu.sustained.get(f"attention_{direction}", 1.0)
    narrow = min(1.0, model.head_dim / 128) ** 0.5  # narrower heads use less of the tensor cores; an estimate
    table = gpu.attention_tflops[setting.kernel][direction]
    counts: dict[int, int] = {}
    for length in setting.lengths:
        counts[length] = counts.get(length, 0) + 1
    windows: dict[int | None, int] = {}
    for window in model.windows:
        windows[window] = windows.get(window, 0) + 1
    seconds = 0.0
    for window, layers in windows.items():
        for length, documents in counts.items():
            work = per_pair * visible_pairs(length, window) * documents * layers
            seconds += work / (rate_at(table, min(length, window or length)) * 1e12 * share * narrow)
    return seconds


def rate_at(table: Sequence[Sequence[float]], tokens: int) -> float:
    """TFLOP/s at a document length: linear in log(tokens) between the measured lengths.

    Below the shortest of them it falls with the square root of the length, above the longest it stays.
    """
    points = sorted((float(n), float(rate)) for n, rate in table)
    if tokens <= points[0][0]:
        return points[0][1] * math.sqrt(tokens / points[0][0])
    for (n0, r0), (n1, r1) in pairwise(points):
        if tokens <= n1:
            return r0 + (r1 - r0) * math.log(tokens / n0) / math.log(n1 / n0)
    return points[-1][1]


def elementwise_bytes(model: ModelSizes, z: Sizes, forwards: float) -> float:
    """Read and written by a layer's norms, rotary embedding, activation and residual adds."""
    forward = 2 * 2 * z.u + 2 * 3 * z.u + 3 * z.f + 2 * (z.q + z.k)
    backward = 2 * 3 * z.u + 2 * 3 * z.u + 5 * z.f + 2 * (z.q + z.k)
    wide = 1 if z.setting.fused else 2.5  # float32 copies of transformers' own norm and rotary embedding
    return wide * (forwards * forward + backward)


def lora_bytes(model: ModelSizes, x: Setting, forwards: float) -> float:
    """`linear._Linears`: x A' reads the input, adding reads and writes the output; backward reads dy twice."""
    if x.lora_r is None:
        return 0.0
    per_token = sum(forwards * 2 * o + 2 * o for _, _, o in model.linear_io)
    inputs = {group: next((i for n, i, _ in model.linear_io if n in group), 0) for group in GROUPS}
    per_token += sum((forwards + 3) * i for i in inputs.values())
    return x.local_tokens * x.element_bytes * per_token


def _kept_groups(keep: Keep) -> list[tuple[str, ...]]:
    return [g for g, kept in zip(GROUPS, (keep.qkv, keep.o, keep.gate_up), strict=False) if kept]


def _elements(model: ModelSizes, names: tuple[str, ...]) -> int:
    return sum(i * o for n, i, o in model.linear_io if n in names)


def _gathering(model: ModelSizes, x: Setting, gpu: Gpu, forwards: float) -> float:
    """ZeRO-3: released weights come once a pass; from the host, if they lie there. Nothing hidden is counted off."""
    if x.stage < 3 or (x.resident and not x.offload_params):
        return 0.0
    whole = x.element_bytes * model.weights * min(forwards + 1, 3)
    seconds = whole * (x.world - 1) / x.world / (gpu.all_gather_gb_s * 1e9)
    return seconds + (whole / x.world / (gpu.host_gb_s * 1e9) if x.offload_params else 0.0)


def _host_copies(model: ModelSizes, z: Sizes, keep: Sequence[Keep], compute_s: float, gpu: Gpu) -> float:
    """What of the copies is not hidden: out during the forward pass (a third of the step), back during the rest."""
    costs = (z.group(GROUPS[0]), z.group(GROUPS[1]), z.group(GROUPS[2]), z.q + z.lse, z.u)
    names = ("qkv", "o", "gate_up", "attention", "input")
    size = sum(c for k in keep for c, n in zip(costs, names, strict=True) if getattr(k, n) == "host")
    copy_s = size / (gpu.host_gb_s * 1e9)
    return max(0.0, copy_s - compute_s / 3) + max(0.0, copy_s - compute_s * 2 / 3)
