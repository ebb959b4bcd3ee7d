"""What is decided for a run before its model is built: asked once, obeyed by the engine, shown by plan.json."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PretrainedConfig

from ds_longft.config.run_config import RunConfig
from ds_longft.decide.memory import SPARE_SHARE, host_bytes, predict
from ds_longft.decide.search import fastest_of, fastest_saver, last_resorts, passes_of
from ds_longft.decide.setting import GIB, Base, Gpu, Setting
from ds_longft.decide.tensors import Keep
from ds_longft.decide.what_is_kept import place
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load_packed import base_format
from ds_longft.objectives.objective import Needs


@dataclass(frozen=True)
class Run:
    """What is known of a run before its model is built. The same on every rank."""

    config: RunConfig
    engine_config: dict[str, Any]  # the merged DeepSpeed JSON, its stage decided (`decide.where_base_lies.settle_base`)
    hf_config: PretrainedConfig  # what the model is built from
    facts: ModelFacts
    sp: int
    world: int
    local_world: int
    gpu: Gpu  # its memory is what the run may use
    has_rates: bool  # whether `gpu` is of the type that is there; else its rates are an H200's
    kernel: str  # of the attention; "" where it is not known: the GPU's fastest
    fused: bool  # liger's kernels
    base: Base = "engine"  # where frozen weights lie, `auto` settled
    why: str = ""  # `auto` settled it so
    disk_gb_s: float = 0.0  # of train.offload_disk, as `train.disk_room` measured it

    @property
    def quantize(self) -> str:
        """Format of the base's weights; "" where they are dense."""
        form = base_format(self.hf_config, self.config.model)
        return form.name if form else ""

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return int(self.engine_config.get("zero_optimization", {}).get("stage", 0))

    @cached_property
    def setting(self) -> Setting:
        """The run as it is configured, for its longest pack: one document, or one pair.

        A kernel that the GPU has no rates for counts as its fastest.
        """
        config, zero = self.config, self.engine_config.get("zero_optimization", {})
        needs, rows = Needs.of(config), config.documents_per_row
        return Setting(
            lengths=(-(-config.longest_pack_tokens // rows),) * rows, sp=self.sp, world=self.world,
            lora_r=config.lora.r if config.lora else None,
            lora_experts=config.lora is not None and config.lora.experts, stage=self.stage, base=self.base,
            quantize=self.quantize, resident=zero.get("stage3_param_persistence_threshold", 0) >= self.facts.weights,
            offload_optimizer="offload_optimizer" in zero, offload_params="offload_param" in zero,
            recompute=config.train.recompute, every=config.train.recompute_every,
            host_gib=config.train.offload_host_gib, disk_gib=math.inf if config.train.offload_disk else 0.0,
            disk_gb_s=self.disk_gb_s, local_world=self.local_world, tile_tokens=config.train.mlp_tile_tokens,
            kv_heads=config.train.kv_heads_at_a_time,
            kernel=self.kernel if self.kernel in self.gpu.attention_tflops else self.gpu.kernels[0],
            fused=self.fused, pairs=config.pairs, reference=needs.reference, passes=needs.passes,
            optimizer=config.optim.type, accumulation=config.train.gradient_accumulation_steps,
        )  # fmt: skip


@dataclass(frozen=True)
class Decisions:
    """How a run saves memory."""

    setting: Setting  # the run's, with `auto` settled
    keep: tuple[Keep, ...] | None = None  # where each layer's tensors wait; None: on the GPU
    planned: bool = True  # False on CPUs: nothing but what the config says

    @classmethod
    def as_configured(cls, run: Run) -> Decisions:
        """Those of a run on CPUs."""
        keep = (Keep(attention="disk", input="disk"),) * run.facts.layers if run.config.train.offload_disk else None
        return cls(replace(run.setting, element_bytes=4), keep, planned=False)


def decide(run: Run) -> Decisions:
    """With `auto` recomputation: tiles, turns and more recomputation only where the longest pack needs them; with
    `dpo.passes: auto` one pass or two; and what waits on the host. Pure: the same run, the same answer.
    """
    model, gpu, setting = run.facts, run.gpu, run.setting
    if setting.recompute == "auto":
        host_gib = run.config.train.offload_host_gib + host_bytes(model, setting) * run.local_world / GIB
        asked, setting = setting, fastest_saver(model, setting, gpu, host_gib)
        if not predict(model, setting, gpu).fits(gpu, host_gib, run.local_world):
            setting = fastest_of((setting, *last_resorts(asked, model)), model, gpu, host_gib)
    else:
        setting = fastest_of(passes_of(setting), model, gpu)
    outside = (gpu.context_gib + (gpu.nccl_gib if run.world > 1 else 0.0)) * GIB
    keep, _ = place(model, setting, gpu.memory_gib * (1 - SPARE_SHARE) * GIB - outside)
    return Decisions(setting, keep)
