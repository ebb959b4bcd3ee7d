"""When memory runs out: which key saves how much, predicted for this run, this model and these GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from ds_longft.config import RunConfig
from ds_longft.errors import GpuMemoryError, ModelError
from ds_longft.objectives.dpo import Reference, reference_of
from ds_longft.plan.memory import SPARE_SHARE, host_bytes, place, predict, stays_resident
from ds_longft.plan.search import (
    TILE_TOKENS,
    Question,
    fastest_of,
    fastest_saver,
    last_resorts,
    passes_of,
)
from ds_longft.plan.setting import GIB, Gpu, ModelSizes, Setting
from ds_longft.plan.step import Keep

WORTH_GIB = 0.5
"""What saves less is not mentioned."""

MOST = 5  # lines of advice

KEPT_GATHERED = 10**12
"""Elements: with this `stage3_param_persistence_threshold` ZeRO-3 never releases a gathered weight."""


@dataclass(frozen=True)
class Adviser:
    """What is known of a run before its model is built; `model` is None where the planner does not describe it."""

    model: ModelSizes | None
    setting: Setting
    gpu: Gpu  # its memory is what the run may use
    config: RunConfig

    @classmethod
    def for_run(
        cls,
        config: RunConfig,
        engine_config: dict[str, Any],
        hf_config: PretrainedConfig,
        *,
        sp: int,
        world: int,
        gpu: Gpu,
        fused: bool,
    ) -> Adviser:
        """Call it before ZeRO-3 is switched on for every model that is built."""
        try:
            model = ModelSizes.from_config(hf_config)
        except ModelError:  # a mixture of experts
            model = None
        setting = setting_of_run(config, engine_config, sp=sp, world=world, local_world=world, gpu=gpu, fused=fused)
        if setting.passes == "auto":  # until it is settled a run makes two passes
            setting = replace(setting, passes="two")
        return cls(model, setting, gpu, config)

    def error(self, seen: BaseException, where: str) -> GpuMemoryError:
        """What a user reads instead of a traceback."""
        first = str(seen).strip().splitlines()[0] if str(seen).strip() else type(seen).__name__
        lines = [f"out of GPU memory {where}: {first}"]
        advice = [f"  {key}   saves about {saved:.1f} GiB a GPU{note}" for key, saved, note in self.savings()]
        if advice:
            lines += [
                f"Packs of {self.setting.tokens:,} tokens, sp {self.setting.sp}. What saves memory, predicted:",
                *advice,
            ]
        lines += self._length()
        lines.append("`ds-longft plan` shows what fits before a run. The newest checkpoint is as it was.")
        return GpuMemoryError("\n".join(lines))

    def savings(self) -> list[tuple[str, float, str]]:
        """(key and value, GiB saved at the peak, a note), most first."""
        if self.model is None:
            return [("train.recompute: sqrt", 0.0, " (the model's memory is not described)")]
        ran = self.setting
        if fastest_saver(self.model, ran, self.gpu).recompute == "none":  # what became of `auto`
            ran = replace(ran, recompute="none")
        now = self._peak(ran)
        found = [(key, (now - self._peak(other)) / GIB, note) for key, other, note in self._others(ran)]
        return sorted((f for f in found if f[1] >= WORTH_GIB), key=lambda f: -f[1])[:MOST]

    def _peak(self, setting: Setting) -> float:
        assert self.model is not None
        bare = replace(setting, recompute="keep_attention") if setting.recompute == "auto" else setting
        return predict(self.model, bare, self.gpu).peak

    def _split(self, x: Setting, *, offload: bool) -> Setting:
        """The same under ZeRO-3, with the shipped JSONs."""
        assert self.model is not None
        resident = stays_resident(
            self.model.weights,
            lora=x.lora_r is not None,
            offload_params=offload,
            world=x.world,
            memory_gib=self.gpu.memory_gib,
        )
        return replace(x, stage=3, resident=resident, offload_optimizer=offload, offload_params=offload)

    def _others(self, x: Setting) -> Iterator[tuple[str, Setting, str]]:
        """Runs that differ from `x` in one key."""
        assert self.model is not None
        larger = next((d for d in range(x.sp + 1, x.world + 1) if x.world % d == 0 and d <= self.model.q_heads), None)
        if larger:
            yield f"sp: {larger}", replace(x, sp=larger), f" ({larger} GPUs share a sample)"
        if x.passes == "one" and self.config.objective == "dpo":
            yield "dpo.passes: two", replace(x, passes="two"), " (one answer at a time; one more forward pass)"
        if x.reference == "model":
            away = replace(x, reference="precomputed")
            yield "dpo.reference: precomputed", away, " (first `ds-longft data ref_logps`; no second model)"
        if x.tile_tokens is None and x.of_a_pass.local_tokens > TILE_TOKENS:
            away = replace(x, tile_tokens=TILE_TOKENS)
            yield f"train.mlp_tile_tokens: {TILE_TOKENS}", away, " (the same speed)"
        if x.kv_heads is None and self.model.kv_heads > x.sp:
            yield "train.kv_heads_at_a_time: 1", replace(x, kv_heads=1), " (attention in turns)"
        if x.recompute == "none":
            away = replace(x, recompute="keep_attention")
            yield "train.recompute: keep_attention", away, " (layers run forward twice, attention once)"
        if x.recompute in ("none", "keep_attention", "auto"):
            yield "train.recompute: full", replace(x, recompute="full"), " (attention runs forward twice)"
        if x.recompute != "sqrt":
            yield "train.recompute: sqrt", replace(x, recompute="sqrt"), " (layers run forward three times)"
        if x.world > 1 and x.stage < 3:
            away = self._split(x, offload=False)
            yield "ds_config: ds_configs/zero3_sp.json", away, " (weights split over all GPUs)"
        if not x.offload_params:
            away = self._split(x, offload=True)
            yield "ds_config: ds_configs/zero3_offload.json", away, " (weights and optimizer in host memory; slow)"
        if not x.fused:
            yield "pip install liger-kernel", replace(x, fused=True), " (norms and activations without float32 copies)"
        if x.lora_r is None:
            reference: Reference = "adapter_off" if x.reference == "model" else x.reference
            away = replace(x, lora_r=16, reference=reference)
            yield "lora: {r: 16}", away, " (adapters instead of all weights)"

    def _length(self) -> list[str]:
        """The longest pack that is predicted to fit as the run is set up."""
        if self.model is None:
            return []
        question = Question(
            self.model,
            self.gpu,
            self.setting.world,
            0.0,
            lora_r=self.setting.lora_r,
            objective=self.config.objective,
        )
        longest = question.longest(replace(self.setting, offload_params=False), "")
        tokens = question.length(longest.setting) if longest else 0
        if not 0 < tokens < question.length(self.setting):
            return []
        if self.config.objective == "dpo":
            return [
                f"  data.max_length_tokens: {tokens} (and data.pack_tokens: {2 * tokens})   are the longest pair and "
                f"pack predicted to fit"
            ]
        return [f"  data.max_length_tokens (and data.pack_tokens): {tokens}   is the longest pack predicted to fit"]


def setting_of_run(
    config: RunConfig,
    engine_config: dict[str, Any],
    *,
    sp: int,
    world: int,
    local_world: int,
    gpu: Gpu,
    fused: bool,
    kernel: str = "",
) -> Setting:
    """A run as the planner describes it, for its longest pack: one document, or one pair.

    `kernel`: of its attention; one that the GPU has no rates for counts as the GPU's fastest.
    """
    zero = engine_config.get("zero_optimization", {})
    pairs, rows = config.objective == "dpo", config.documents_per_row
    return Setting(
        lengths=(-(-config.longest_pack_tokens // rows),) * rows,
        sp=sp,
        world=world,
        lora_r=config.lora.r if config.lora else None,
        stage=int(zero.get("stage", 0)),
        resident=zero.get("stage3_param_persistence_threshold", 0) == KEPT_GATHERED,
        offload_optimizer="offload_optimizer" in zero,
        offload_params="offload_param" in zero,
        recompute=config.train.recompute,
        every=config.train.recompute_every,
        host_gib=config.train.offload_host_gib,
        local_world=local_world,
        tile_tokens=config.train.mlp_tile_tokens,
        kv_heads=config.train.kv_heads_at_a_time,
        kernel=kernel if kernel in gpu.attention_tflops else gpu.kernels[0],
        fused=fused,
        reference=reference_of(config.dpo, lora=config.lora is not None) if pairs else "none",
        passes=config.dpo.passes if pairs else "one",
        accumulation=config.train.gradient_accumulation_steps,
    )


def choose_for_run(
    config: RunConfig,
    engine_config: dict[str, Any],
    hf_config: PretrainedConfig,
    *,
    sp: int,
    world: int,
    local_world: int,
    gpu: Gpu,
    fused: bool,
    kernel: str = "",
) -> tuple[Setting, tuple[Keep, ...]] | None:
    """With `auto` recomputation: tiles, turns and more recomputation only where the longest pack needs them; with
    `dpo.passes: auto` one pass or two; and what waits on the host.

    None for a model that the planner does not describe: everything is then kept on the GPU. Call it before ZeRO-3 is
    switched on for every model that is built.
    """
    try:
        model = ModelSizes.from_config(hf_config)
    except ModelError:
        return None
    setting = setting_of_run(
        config, engine_config, sp=sp, world=world, local_world=local_world, gpu=gpu, fused=fused, kernel=kernel
    )
    if setting.recompute == "auto":
        host_gib = config.train.offload_host_gib + host_bytes(model, setting) * local_world / GIB
        asked, setting = setting, fastest_saver(model, setting, gpu, host_gib)
        if not predict(model, setting, gpu).fits(gpu, host_gib, local_world):
            setting = fastest_of(last_resorts(asked, model), model, gpu, host_gib)
    else:
        setting = fastest_of(passes_of(setting), model, gpu)
    outside = (gpu.context_gib + (gpu.nccl_gib if world > 1 else 0.0)) * GIB
    keep, _ = place(model, setting, gpu.memory_gib * (1 - SPARE_SHARE) * GIB - outside)
    return setting, keep
