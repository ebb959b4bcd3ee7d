"""What a rank holds all the time: weights, gradients, optimizer states; and the memory of a step played on top."""

from __future__ import annotations

from functools import lru_cache

from ds_longft.config.optimizers import KINDS
from ds_longft.decide.setting import Setting
from ds_longft.decide.simulated_step import SimulatedStep
from ds_longft.decide.tensors import REFERENCE, TRAINABLE, WEIGHTS, Keep, Sizes, bytes_of_layers, made_dense
from ds_longft.decide.timeline import Timeline
from ds_longft.model.facts import ModelFacts

STREAMED = ("sharded", "host")
"""Bases whose layers come a layer ahead into one of `SLOTS` slots (`sequence/frozen.py`)."""

SLOTS = 2

MAX_LIVE_PARAMETERS = 1e9
"""Elements of gathered weights that ZeRO-3 keeps (DeepSpeed's stage3_max_live_parameters, its default)."""

SUB_GROUP_ELEMENTS = 1e9
"""Elements that ZeRO-3 steps the optimizer on at a time (DeepSpeed's sub_group_size, its default)."""


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


def of_optimizer(setting: Setting) -> float:
    """Bytes of a trained element's float32 master and the optimizer's state."""
    return 4 + KINDS[setting.optimizer].state_bytes


def models(setting: Setting) -> int:
    """How many models lie in memory: with `reference: model` a frozen one beside the trained one."""
    return 2 if setting.reference == "model" else 1
