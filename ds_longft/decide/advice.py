"""When memory runs out: which key saves how much, predicted for this run, this model and these GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ds_longft.decide.decisions import Run
from ds_longft.decide.held import STREAMED
from ds_longft.decide.memory import Memory, host_bytes, predict, stays_resident
from ds_longft.decide.search import TILE_TOKENS, Question, fastest_saver
from ds_longft.decide.setting import GIB, Setting
from ds_longft.errors import GpuMemoryError
from ds_longft.model.load_packed import stored_as
from ds_longft.objectives.objective import Reference

WORTH_GIB = 0.5
"""What saves less is not mentioned."""

MOST = 8  # lines of advice


@dataclass(frozen=True)
class Adviser:
    """Advice for one run."""

    run: Run

    @cached_property
    def setting(self) -> Setting:
        """The run as it is configured; until `passes: auto` is settled a run makes two passes."""
        setting = self.run.setting
        return replace(setting, passes="two") if setting.passes == "auto" else setting

    def error(self, seen: BaseException, where: str) -> GpuMemoryError:
        """What a user reads instead of a traceback."""
        first = str(seen).strip().splitlines()[0] if str(seen).strip() else type(seen).__name__
        lines = [f"out of GPU memory {where}: {first}"]
        advice = [f"  {key}   saves about {saved:.1f} GiB per GPU{note}" for key, saved, note in self.savings()]
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
        if self.run.facts.state_products:
            return [("train.recompute: sqrt", 0.0, " (the model's memory is not described)")]
        ran = self.setting
        if fastest_saver(self.run.facts, ran, self.run.gpu).recompute == "none":  # what became of `auto`
            ran = replace(ran, recompute="none")
        now, found = self._memory(ran), []
        for key, other, note in self._others(ran):
            then = self._memory(other)
            enough = self._fits(other, then) and not self._fits(ran, now)
            found.append((enough, (now.peak - then.peak) / GIB, key, note + ": then it fits" * enough))
        most = sorted((f for f in found if f[0] or f[1] >= WORTH_GIB), key=lambda f: f[:2], reverse=True)[:MOST]
        return [(key, saved, note) for _, saved, key, note in sorted(most, key=lambda f: -f[1])]

    def _memory(self, setting: Setting) -> Memory:
        bare = replace(setting, recompute="keep_attention") if setting.recompute == "auto" else setting
        return predict(self.run.facts, bare, self.run.gpu)

    def _fits(self, x: Setting, memory: Memory) -> bool:
        nodes_ranks = x.local_world or x.world
        host_gib = x.host_gib + host_bytes(self.run.facts, x) * nodes_ranks / GIB
        return memory.fits(self.run.gpu, host_gib, nodes_ranks)

    def _split(self, x: Setting, *, offload: bool) -> Setting:
        """The same under ZeRO-3, with the shipped JSONs."""
        lora, memory_gib = x.lora_r is not None, self.run.gpu.memory_gib
        whole = stays_resident(2 * self.run.facts.weights, lora=lora, offload_params=offload, memory_gib=memory_gib)
        away = replace(x, resident=False, offload_optimizer=offload, offload_params=offload)
        return replace(away, stage=2 if whole else 3)

    def _others(self, x: Setting) -> Iterator[tuple[str, Setting, str]]:
        """Runs that differ from `x` in one key."""
        q_heads = self.run.facts.q_heads
        larger = next((d for d in range(x.sp + 1, x.world + 1) if x.world % d == 0 and d <= q_heads), None)
        if larger:
            yield f"sp: {larger}", replace(x, sp=larger), f" ({larger} GPUs share a sample)"
        if x.passes == "one" and x.pairs:
            yield "dpo.passes: two", replace(x, passes="two"), " (one answer at a time; one more forward pass)"
        if x.reference == "model":
            away = replace(x, reference="precomputed")
            yield "dpo.reference: precomputed", away, " (first `ds-longft data ref_logps`; no second model)"
        if x.tile_tokens is None and x.of_a_pass.local_tokens > TILE_TOKENS:
            away = replace(x, tile_tokens=TILE_TOKENS)
            yield f"train.mlp_tile_tokens: {TILE_TOKENS}", away, " (the same speed)"
        if x.kv_heads is None and self.run.facts.kv_heads > x.sp:
            yield "train.kv_heads_at_a_time: 1", replace(x, kv_heads=1), " (attention in turns)"
        if x.recompute == "none":
            away = replace(x, recompute="keep_attention")
            yield "train.recompute: keep_attention", away, " (layers run forward twice, attention once)"
        if x.recompute in ("none", "keep_attention", "auto"):
            yield "train.recompute: full", replace(x, recompute="full"), " (attention runs forward twice)"
        if x.recompute != "sqrt":
            yield "train.recompute: sqrt", replace(x, recompute="sqrt"), " (layers run forward three times)"
        if x.lora_r is not None and x.base != "host" and not x.offload_params:
            yield "model.base: host", replace(x, base="host", stage=min(x.stage, 2)), " (weights come from host memory)"
        if x.lora_r is not None and x.quantize != "nf4" and not stored_as(self.run.hf_config):
            yield "model.quantize: nf4", replace(x, quantize="nf4"), " (the base in 4 bits, a slightly other model)"
        if not x.host_gib and not x.offload_params:
            away = replace(x, host_gib=math.inf)
            gib = math.ceil(self._memory(away).host * (x.local_world or x.world) / GIB)
            yield f"train.offload_host_gib: {gib}", away, " (of each node, for what layers keep)"
        elif not x.disk_gib and not x.offload_params:
            yield "train.offload_disk: FOLDER", replace(x, disk_gib=math.inf), " (on an NVMe disk, behind host memory)"
        if x.world > 1 and x.stage < 3 and x.base not in STREAMED:
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
        run = self.run
        if run.facts.state_products:
            return []
        x = self.setting
        question = Question(
            run.facts, run.gpu, run.world, 0.0, lora_r=x.lora_r, lora_experts=x.lora_experts, pairs=x.pairs
        )
        longest = question.longest(replace(x, offload_params=False), "")
        tokens = question.length(longest.setting) if longest else 0
        if not 0 < tokens < question.length(x):
            return []
        if x.pairs:
            return [
                f"  data.max_length_tokens: {tokens} (and data.pack_tokens: {2 * tokens})   are the longest pair and "
                f"pack predicted to fit"
            ]
        return [f"  data.max_length_tokens (and data.pack_tokens): {tokens}   is the longest pack predicted to fit"]
