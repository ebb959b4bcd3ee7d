"""When memory runs out: which key saves how much, predicted for this run, this model and these GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_longft.config.run_config import RunConfig
from ds_longft.decide.decisions import Run
from ds_longft.decide.memory import predict, stays_resident
from ds_longft.decide.search import TILE_TOKENS, Question, fastest_saver
from ds_longft.decide.setting import GIB, Gpu, ModelSizes, Setting
from ds_longft.errors import GpuMemoryError
from ds_longft.objectives.objective import Reference

WORTH_GIB = 0.5
"""What saves less is not mentioned."""

MOST = 5  # lines of advice


@dataclass(frozen=True)
class Adviser:
    """What is known of a run before its model is built; `model` is None where the planner does not describe it."""

    model: ModelSizes | None
    setting: Setting
    gpu: Gpu  # its memory is what the run may use
    config: RunConfig

    @classmethod
    def for_run(cls, run: Run) -> Adviser:
        """Call it before ZeRO-3 is switched on for every model that is built."""
        setting = run.setting
        if setting.passes == "auto":  # until it is settled a run makes two passes
            setting = replace(setting, passes="two")
        return cls(run.model, setting, run.gpu, run.config)

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
        lora, memory_gib = x.lora_r is not None, self.gpu.memory_gib
        whole = stays_resident(2 * self.model.weights, lora=lora, offload_params=offload, memory_gib=memory_gib)
        away = replace(x, resident=False, offload_optimizer=offload, offload_params=offload)
        return replace(away, stage=2 if whole else 3)

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
