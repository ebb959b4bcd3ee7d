"""Peak memory of one optimizer step on the fullest rank, and whether it fits.

What is held all the time is in `held.py`, the tensors of the step in `simulated_step.py`, what of them waits for the
backward pass in `what_is_kept.py`; docs/plan.md has all as formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_longft.decide.held import models, of_optimizer, step_timeline
from ds_longft.decide.setting import GIB, Gpu, Setting
from ds_longft.decide.tensors import BEFORE_STATE, GROUPS, Keep, by_layer, bytes_of_layers
from ds_longft.decide.what_is_kept import bytes_elsewhere, host_share, place, spend
from ds_longft.model.facts import ModelFacts

SPARE_SHARE = 0.06
"""Share of GPU memory that is never planned with nor spent: the allocator's fragments, NCCL, workspaces."""

RESIDENT_SHARE = 0.35
"""Frozen weights stay whole on each GPU when they take no more of it than this."""


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
        costs = [{group: z.group(group) for group in names.values()} for z in by_layer(model, setting)]
        elsewhere = host or any(k.on_disk for k in keep)
        allowed = 0.0 if elsewhere else host_share(setting)  # linears are worth less than what is there already
        places, _, on_host = spend(costs, room - timeline.peak, allowed)
        if any(places):
            host += on_host
            kept = ({name: chosen[group] for name, group in names.items() if group in chosen} for chosen in places)
            keep = tuple(replace(k, **more) for k, more in zip(keep, kept, strict=True))
            timeline = step_timeline(model, setting, keep)
    host += host_bytes(model, setting)
    disk = bytes_elsewhere(model, setting, keep, ("disk",))
    return Memory(timeline.peak, timeline.moment, timeline.at_peak, outside, host, disk, keep)


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
