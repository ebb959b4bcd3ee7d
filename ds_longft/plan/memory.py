"""Peak memory of one optimizer step on the fullest rank: what is held all the time, and where kept tensors are placed.

The tensors of the step itself are in `step.py`; docs/plan.md has both as formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_longft.plan.setting import GIB, Gpu, ModelSizes, Setting
from ds_longft.plan.step import GROUPS, REFERENCE, TRAINABLE, WEIGHTS, Keep, Sizes, Step
from ds_longft.plan.timeline import Timeline
from ds_longft.sequence.kept import LEAVING

SPARE_SHARE = 0.06
"""Of GPU memory, never planned with: the allocator's fragments, NCCL, kernels' workspaces. As `train.speed` spends."""

MAX_LIVE_PARAMETERS = 1e9
"""ZeRO-3 keeps gathered weights up to so many elements (DeepSpeed's stage3_max_live_parameters, its default)."""

SUB_GROUP_ELEMENTS = 1e9
"""ZeRO-3 steps the optimizer on so many elements at a time (DeepSpeed's sub_group_size, its default)."""


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


def predict(model: ModelSizes, setting: Setting, gpu: Gpu) -> Memory:
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
        spent, host = spend(model, setting, keep, room - timeline.peak, host)
        if spent != keep:
            keep, timeline = spent, step_timeline(model, setting, spent)
    host += host_bytes(model, setting)
    return Memory(timeline.peak, timeline.moment, timeline.at_peak, outside, host, keep)


def place(model: ModelSizes, setting: Setting, room: float) -> tuple[tuple[Keep, ...], float]:
    """Layer inputs and attention outputs: on the GPU what fits into `room` bytes, then on the host, then nowhere.

    Later layers stay on the GPU: what the first ones send away has the longest time to go and to come back. Without
    host memory everything that the policy keeps stays on the GPU. Also the bytes on this rank's host.
    """
    setting = setting.of_a_pass
    allowed, count = host_share(setting), model.layers
    plain = (Keep(),) * count
    if not allowed or setting.recompute == "none" or step_timeline(model, setting, plain).peak <= room:
        return plain, 0.0
    sizes, keeping = Sizes(model, setting), setting.recompute in ("keep_attention", "auto")
    inputs = segment_starts(model, setting) if setting.recompute in ("every_k", "sqrt") else range(count)
    away = [Keep(attention="", input="host" if i in inputs else "device") for i in range(count)]
    host = sizes.u * len(inputs)
    free = room - step_timeline(model, setting, tuple(away)).peak
    attention = sizes.q + sizes.lse
    transit = LEAVING * attention if keeping else 0.0
    for i in reversed(inputs):  # the peak holds every input that stays
        if sizes.u > free - transit:
            break
        away[i] = replace(away[i], input="device")
        free, host = free - sizes.u, host - sizes.u
    for i in reversed(range(count if keeping else 0)):
        if attention <= free - transit:
            away[i] = replace(away[i], attention="device")
            free -= attention
        elif host + attention <= allowed and transit <= free:
            away[i] = replace(away[i], attention="host")
            host += attention
    return tuple(away), host


def segment_starts(model: ModelSizes, setting: Setting) -> range:
    """First layers of the segments of `every_k` and `sqrt`."""
    size = setting.every if setting.recompute == "every_k" else max(1, round(model.layers**0.5))
    return range(0, model.layers, size)


def host_share(setting: Setting) -> float:
    """Bytes of host memory that a rank may use for kept tensors."""
    return setting.host_gib * GIB / (setting.local_world or setting.world)


def spend(
    model: ModelSizes, setting: Setting, keep: tuple[Keep, ...], free: float, host: float
) -> tuple[tuple[Keep, ...], float]:
    """`train.speed.Recompute.spend`: which linears are kept where with `free` bytes left on the GPU.

    `host`: bytes this rank has on the host already; returned with what is added.
    """
    sizes = Sizes(model, setting)
    cost = {"qkv": sizes.group(GROUPS[0]), "o": sizes.group(GROUPS[1]), "gate_up": sizes.group(GROUPS[2])}
    if setting.tile_tokens:
        cost["gate_up"] = 0.0  # tiles have no whole output to keep
    order = list(reversed(range(model.layers)))
    wanted = [(i, "qkv") for i in order] + [(i, name) for i in order for name in ("o", "gate_up")]
    allowed = host_share(setting)
    if allowed:
        free -= LEAVING * (cost["o"] + cost["gate_up"])
    chosen: list[dict[str, str]] = [{} for _ in range(model.layers)]
    on_device = 0.0
    for i, name in wanted:
        if cost[name] and on_device + cost[name] <= free:
            chosen[i][name] = "device"
            on_device += cost[name]
        elif name != "qkv" and cost[name] and free > 0 and host + cost[name] <= allowed:
            chosen[i][name] = "host"
            host += cost[name]
    return tuple(replace(k, **c) for k, c in zip(keep, chosen, strict=True)), host


def host_bytes(model: ModelSizes, setting: Setting) -> float:
    """Pinned host memory of a rank for what the DeepSpeed JSON offloads."""
    trained = trained_weights(model, setting) / setting.world
    states = (12 + 4) * trained if setting.offload_optimizer else 0.0  # master, two moments, gradient, float32
    return states + (2 * models(setting) * model.weights / setting.world if setting.offload_params else 0.0)


def models(setting: Setting) -> int:
    """How many models lie in memory: with `reference: model` a frozen one beside the trained one."""
    return 2 if setting.reference == "model" else 1


def trained_weights(model: ModelSizes, setting: Setting) -> int:
    """Elements with a gradient."""
    return model.weights if setting.lora_r is None else model.lora_weights(setting.lora_r)


def fixed(model: ModelSizes, setting: Setting) -> dict[str, float]:
    """Bytes held all the time: weights, and what belongs to the trained ones (DeepSpeed 0.19.8, bf16).

    Weights 2 bytes, a frozen reference's too; master and two moments 12 bytes a trained element, split over ranks from
    stage 1; gradients 2, split from stage 2, and there 4 for adapters and where several packs are summed
    (`ds_config._fill_sum_types`); reduce buckets of 2 bytes.
    """
    e, world, trained = setting.element_bytes, setting.world, trained_weights(model, setting)
    whole = own = weights = float(e * model.weights)
    if setting.stage == 3:
        own = 0.0 if setting.offload_params else whole / world
        gathered = whole if setting.resident else e * min(models(setting) * model.weights, MAX_LIVE_PARAMETERS)
        weights = own + gathered
    split_states = world if setting.stage >= 1 else 1
    split_gradients = world if setting.stage >= 2 else 1
    states = 0.0 if setting.offload_optimizer else 12 * trained / split_states
    in_float32 = setting.stage >= 2 and (setting.lora_r is not None or setting.accumulation > 1)
    gradients = 0.0 if setting.offload_optimizer else (4 if in_float32 else e) * trained / split_gradients
    bucket = 5e6 if setting.lora_r is not None else max(5e6, model.hidden**2)
    buffers = (2 if setting.stage >= 2 else 1) * e * bucket
    if setting.lora_r is not None:
        weights += e * trained / (world if setting.stage == 3 else 1)
    return {WEIGHTS: weights, REFERENCE: (models(setting) - 1) * own, TRAINABLE: states + gradients + buffers}


def step_timeline(model: ModelSizes, setting: Setting, keep: tuple[Keep, ...]) -> Timeline:
    """Forward, backward and optimizer step of one pack."""
    t = Timeline()
    for part, size in fixed(model, setting).items():
        t.hold(part, size, part)
    Step(t, Sizes(model, setting), keep).run()
    elements = trained_weights(model, setting) / (setting.world if setting.stage >= 1 else 1)
    if not setting.offload_optimizer:  # gradients in float32 while the optimizer steps
        t.during(
            "float32 gradients", 4 * (min(elements, SUB_GROUP_ELEMENTS) if setting.stage == 3 else elements), TRAINABLE
        )
    return t
