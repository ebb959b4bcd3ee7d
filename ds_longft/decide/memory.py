"""Peak memory of one optimizer step on the fullest rank: what is held all the time, and where kept tensors are placed.

The tensors of the step itself are in `simulated_step.py`; docs/plan.md has both as formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ds_longft.config.optimizers import KINDS
from ds_longft.decide.setting import GIB, Gpu, Setting
from ds_longft.decide.simulated_step import SimulatedStep, bytes_away
from ds_longft.decide.tensors import (
    BEFORE_STATE,
    GROUPS,
    REFERENCE,
    TRAINABLE,
    WEIGHTS,
    Keep,
    Sizes,
    bytes_of_layers,
    made_dense,
)
from ds_longft.decide.timeline import Timeline
from ds_longft.model.facts import ModelFacts
from ds_longft.sequence.kept import LEAVING

SPARE_SHARE = 0.06
"""Share of GPU memory that is never planned with nor spent: the allocator's fragments, NCCL, workspaces."""

RESIDENT_SHARE = 0.35
"""Frozen weights stay whole on each GPU when they take no more of it than this."""

STREAMED = ("sharded", "host")
"""Bases whose layers come a layer ahead into one of `SLOTS` slots (`sequence/frozen.py`)."""

SLOTS = 2

MAX_LIVE_PARAMETERS = 1e9
"""Elements of gathered weights that ZeRO-3 keeps (DeepSpeed's stage3_max_live_parameters, its default)."""

SUB_GROUP_ELEMENTS = 1e9
"""Elements that ZeRO-3 steps the optimizer on at a time (DeepSpeed's sub_group_size, its default)."""


@dataclass(frozen=True)
class Memory:
    """A predicted peak, of the fullest rank."""

    peak: float  # bytes that torch has allocated at the highest moment
    moment: str  # what was being computed then
    parts: dict[str, float]  # the same bytes by what they are
    outside: float  # bytes beside torch's: CUDA context, NCCL
    host: float  # pinned host memory of this rank, bytes
    disk: float  # files of this rank, bytes
    keep: tuple[Keep, ...]  # per layer

    @property
    def peak_gib(self) -> float:
        """What `torch.cuda.max_memory_allocated` is expected to say."""
        return self.peak / GIB

    def fits(self, gpu: Gpu, host_gib: float | None = None, local_world: int = 1) -> bool:
        """Within the GPU's memory less the reserve, and the node's host memory where it is given."""
        room = gpu.memory_gib * (1 - SPARE_SHARE) * GIB
        return self.peak + self.outside <= room and (host_gib is None or self.host * local_world <= host_gib * GIB)


def predict(model: ModelFacts, setting: Setting, gpu: Gpu) -> Memory:
    """The peak of one step, with tensors placed as the run places them (`place`, `spend`).

    Of pairs it is the peak of a forward and backward pass with its graph: passes without a graph (the reference, and
    the log-probabilities ahead of two passes) make the same tensors, and keep none of them.
    """
    setting = setting.of_a_pass
    outside = (gpu.context_gib + (gpu.nccl_gib if setting.world > 1 else 0.0)) * GIB
    room = gpu.memory_gib * (1 - SPARE_SHARE) * GIB - outside
    keep, host = place(model, setting, room)
    timeline = step_timeline(model, setting, keep)
    if setting.recompute == "auto":
        names = {"qkv": GROUPS[0], "o": GROUPS[1], "gate_up": GROUPS[2], "state": BEFORE_STATE}
        if setting.tile_tokens:
            del names["gate_up"]  # tiles have no whole output to keep
        sizes = {kind: Sizes(kind, setting) for kind in model.kinds}
        costs = [{group: sizes[kind].group(group) for group in names.values()} for kind in model.by_layer]
        elsewhere = host or any(k.on_disk for k in keep)
        allowed = 0.0 if elsewhere else host_share(setting)  # linears are worth less than what is there already
        places, _, on_host = spend(costs, room - timeline.peak, allowed)
        if any(places):
            host += on_host
            kept = ({name: chosen[group] for name, group in names.items() if group in chosen} for chosen in places)
            keep = tuple(replace(k, **more) for k, more in zip(keep, kept, strict=True))
            timeline = step_timeline(model, setting, keep)
    host += host_bytes(model, setting)
    disk = disk_bytes(model, setting, keep)
    return Memory(timeline.peak, timeline.moment, timeline.at_peak, outside, host, disk, keep)


def place(model: ModelFacts, setting: Setting, room: float) -> tuple[tuple[Keep, ...], float]:
    """Layer inputs and attention outputs: on the GPU what fits into `room` bytes, then on host, on disk, nowhere.

    Later layers stay on the GPU: what the first ones send away has the longest time to go and to come back. Inputs for
    the disk are those of layers at even distances, so that its writes have the whole pass to go in. Without host memory
    and disk everything that the policy keeps stays on the GPU. Also the bytes on this rank's host.
    """
    setting = setting.of_a_pass
    allowed, count = host_share(setting), model.layers
    disk = setting.disk_gib * GIB / (setting.local_world or setting.world)
    plain = (Keep(),) * count
    if not (allowed or disk) or setting.recompute == "none" or step_timeline(model, setting, plain).peak <= room:
        return plain, 0.0
    sizes, keeping = Sizes(model, setting), setting.recompute in ("keep_attention", "auto")
    inputs = segment_starts(model, setting) if setting.recompute in ("every_k", "sqrt") else range(count)
    away = [Keep(attention="", input="host" if i in inputs else "device") for i in range(count)]
    host = sizes.u * len(inputs)
    free = room - step_timeline(model, setting, tuple(away)).peak
    of_kinds = {kind: Sizes(kind, setting) for kind in model.kinds}
    attentions = [of_kinds[kind].q + of_kinds[kind].lse for kind in model.by_layer]
    transit = LEAVING * max(attentions) if keeping else 0.0
    for i in reversed(inputs):  # the peak holds every input that stays
        if sizes.u > free - transit:
            break
        away[i] = replace(away[i], input="device")
        free, host = free - sizes.u, host - sizes.u
    over = [i for i in inputs if away[i].input == "host"]
    moved = min(len(over), math.ceil(max(0.0, host - allowed) / sizes.u), int(min(disk / sizes.u, len(over))))
    for n in range(moved):
        i = over[n * len(over) // moved]
        away[i] = replace(away[i], input="disk")
        host, disk = host - sizes.u, disk - sizes.u
    for i in reversed(range(count if keeping else 0)):
        attention = attentions[i]
        if attention <= free - transit:
            away[i] = replace(away[i], attention="device")
            free -= attention
        elif host + attention <= allowed and transit <= free:
            away[i] = replace(away[i], attention="host")
            host += attention
        elif attention <= disk and transit <= free:
            away[i] = replace(away[i], attention="disk")
            disk -= attention
    return tuple(away), host


def segment_starts(model: ModelFacts, setting: Setting) -> range:
    """First layers of the segments of `every_k` and `sqrt`."""
    size = setting.every if setting.recompute == "every_k" else max(1, round(model.layers**0.5))
    return range(0, model.layers, size)


def disk_bytes(model: ModelFacts, setting: Setting, keep: Sequence[Keep]) -> float:
    """Bytes of a rank's files."""
    of_kinds = {kind: Sizes(kind, setting) for kind in model.kinds}
    return sum(sum(bytes_away(of_kinds[kind], k, ("disk",))) for kind, k in zip(model.by_layer, keep, strict=True))


def host_share(setting: Setting) -> float:
    """Bytes of host memory that a rank may use for kept tensors."""
    return setting.host_gib * GIB / (setting.local_world or setting.world)


def spend(
    costs: Sequence[Mapping[tuple[str, ...], float]], free: float, host_free: float
) -> tuple[list[dict[tuple[str, ...], str]], float, float]:
    """Which linears' outputs wait for the backward pass, and where: "device" or "host".

    A kept element saves the same time in every linear that reads the hidden states (2 * hidden size operations), so
    what counts is what fits. q, k and v come first, and stay on the device. Of the rest later layers come first.
    Device and host take turns, so that copies have the whole pass to go in: where 22 layers in a row (Llama-8B, eight
    documents of 16,384 tokens, two H200s) sent 4.0 GiB each in the time of 3.0 GiB, a step of 5.9 s waited for 0.5 s.
    The last layer stays on the device, it is wanted at once. Two layers' share of the host is on the GPU at a time.

    Args:
        costs: of each layer, names of a group of linears -> bytes that keeping its outputs takes.
        free: bytes on the device.
        host_free: bytes on this rank's host.

    Returns the places of each layer's groups, and the bytes spent on the device and on the host.
    """
    places: list[dict[tuple[str, ...], str]] = [{} for _ in costs]
    on_device = on_host = spread = 0.0
    groups = [(i, names, cost) for i in reversed(range(len(costs))) for names, cost in costs[i].items() if cost]
    groups.sort(key=lambda x: ("q_proj" not in x[1], -x[0], x[2]))
    movable = sum(cost for _, names, cost in groups if "q_proj" not in names)
    if host_free:
        free -= LEAVING * max((sum(c for n, c in layer.items() if "q_proj" not in n) for layer in costs), default=0.0)
    if free <= 0:
        return places, 0.0, 0.0
    still = max(0.0, free - sum(cost for _, names, cost in groups if "q_proj" in names))  # of the device, for the rest
    away = max(0.0, min(host_free, movable - still))
    for i, names, cost in groups:
        fixed = "q_proj" in names
        spread += 0.0 if fixed else cost
        fits, to_host = on_device + cost <= free, not fixed and on_host + cost <= host_free
        if to_host and (not fits or (on_host + cost) * (still + away) <= away * spread):
            places[i][names] = "host"
            on_host += cost
        elif fits:
            places[i][names] = "device"
            on_device += cost
    return places, on_device, on_host


def stays_resident(weights_bytes: int, *, lora: bool, offload_params: bool, memory_gib: float) -> bool:
    """Whether a model's weights stay whole on each GPU though the JSON says ZeRO-3: with LoRA, not offloaded, where
    they fit into their share of it.
    """
    return lora and not offload_params and weights_bytes / GIB <= RESIDENT_SHARE * memory_gib


def host_bytes(model: ModelFacts, setting: Setting) -> float:
    """Pinned host memory of a rank for what the DeepSpeed JSON offloads, and its part of a base that lies there."""
    trained = model.trained_weights(setting.lora_r, setting.lora_experts) / setting.world
    states = (4 + of_optimizer(setting)) * trained if setting.offload_optimizer else 0.0  # and gradients in float32
    if setting.base == "host":
        states += bytes_of_layers(model, setting) / (setting.local_world or setting.world)
    return states + (2 * models(setting) * model.weights / setting.world if setting.offload_params else 0.0)


def of_optimizer(setting: Setting) -> float:
    """Bytes of a trained element's float32 master and the optimizer's state."""
    return 4 + KINDS[setting.optimizer].state_bytes


def models(setting: Setting) -> int:
    """How many models lie in memory: with `reference: model` a frozen one beside the trained one."""
    return 2 if setting.reference == "model" else 1


def fixed(model: ModelFacts, setting: Setting) -> dict[str, float]:
    """Bytes held all the time: weights, and what belongs to the trained ones (DeepSpeed 0.19.8, bf16).

    Weights 2 bytes, a frozen reference's too; master and AdamW's two moments 12 bytes a trained element (of other
    optimizers: `config/optimizers.py`), split over ranks from stage 1; gradients 2, split from stage 2, and there 4 for
    adapters and where several packs are summed (`config/ds_json.py`, `_fill_sum_types`); reduce buckets of 2 bytes.
    """
    e, world, trained = (
        setting.element_bytes,
        setting.world,
        model.trained_weights(setting.lora_r, setting.lora_experts),
    )
    shared = bytes_of_layers(model, setting)
    whole = own = weights = float(e * (model.weights - model.layers_weights)) + shared
    if setting.stage == 3:
        divided = whole - shared if setting.quantize else whole  # packed weights lie whole on each rank
        own = 0.0 if setting.offload_params else divided / world
        gathered = divided if setting.resident else min(models(setting) * divided, e * MAX_LIVE_PARAMETERS)
        weights = own + gathered + whole - divided
        own += whole - divided
    if setting.base in STREAMED:
        slot = shared * model.largest_layer / model.layers_weights
        weights = whole - shared + SLOTS * slot + (shared / world if setting.base == "sharded" else 0)
    weights += made_dense(model, setting)
    split_states = world if setting.stage >= 1 else 1
    split_gradients = world if setting.stage >= 2 else 1
    states = 0.0 if setting.offload_optimizer else of_optimizer(setting) * trained / split_states
    in_float32 = setting.stage >= 2 and (setting.lora_r is not None or setting.accumulation > 1)
    gradients = 0.0 if setting.offload_optimizer else (4 if in_float32 else e) * trained / split_gradients
    bucket = 5e6 if setting.lora_r is not None else max(5e6, model.hidden**2)
    buffers = (2 if setting.stage >= 2 else 1) * e * bucket
    if setting.lora_r is not None:
        weights += e * trained / (world if setting.stage == 3 else 1)
    return {WEIGHTS: weights, REFERENCE: (models(setting) - 1) * own, TRAINABLE: states + gradients + buffers}


@lru_cache(maxsize=512)  # half of what a search asks for it has asked for before
def step_timeline(model: ModelFacts, setting: Setting, keep: tuple[Keep, ...]) -> Timeline:
    """Forward, backward and optimizer step of one pack."""
    t = Timeline()
    for part, size in fixed(model, setting).items():
        t.hold(part, size, part)
    SimulatedStep(t, Sizes(model, setting), keep).run()
    elements = model.trained_weights(setting.lora_r, setting.lora_experts) / (
        setting.world if setting.stage >= 1 else 1
    )
    if not setting.offload_optimizer:  # gradients in float32 while the optimizer steps
        t.during(
            "float32 gradients", 4 * (min(elements, SUB_GROUP_ELEMENTS) if setting.stage == 3 else elements), TRAINABLE
        )
    return t
