"""Which settings fit: the longest length of each, and the fastest at a given length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ds_longft.config.optimizers import KINDS
from ds_longft.decide.held import STREAMED
from ds_longft.decide.memory import Memory, predict, stays_resident
from ds_longft.decide.setting import GIB, Base, Gpu, Setting
from ds_longft.decide.tensors import bytes_of_layers
from ds_longft.decide.time import StepTime, predict_time
from ds_longft.model.facts import ModelFacts
from ds_longft.objectives.objective import Passes, Reference

LENGTH_STEP = 1024
"""Lengths are searched in multiples of this, in tokens."""

LONGEST = 1 << 27

WORTH_SAVING = 0.02
"""Share of a step that tiles and turns must save, unless nothing else fits. Predictions say nothing about less."""

ROOMY = 0.8
"""Of a GPU: where a step that keeps everything is predicted to need no more, `auto` computes nothing again. Predicted
peaks without recomputation are within 3 % of counted ones; what is gained is no reason to come near the limit."""


RECOMPUTE = (("auto", 2), ("full", 2), ("every_k", 2), ("every_k", 3), ("every_k", 4), ("sqrt", 2))
"""`train.recompute` and `train.recompute_every` that are considered. Short segments leave less of one segment on the
GPU while their many inputs wait on the host; long ones leave few inputs where there is no host memory."""

TILE_TOKENS = 8192
"""An MLP tile: large enough for the tensor cores, small beside a long shard."""

LEAST_TILE_TOKENS = 4096
"""Where nothing else fits: of a Llama-8B 0.5 GiB less at the peak, 2 % more tokens on a card of 24 GB."""


def passes_of(setting: Setting) -> list[Setting]:
    """`passes: auto` settled both ways, one pass first; anything else is settled already."""
    if setting.passes != "auto":
        return [setting]
    return [replace(setting, passes="one"), replace(setting, passes="two")]


def savers(setting: Setting, model: ModelFacts) -> Iterator[Setting]:
    """The setting as it is, then with MLP tiles, with heads in turns as well, with smaller tiles: first in one pass,
    then in two.
    """
    for settled in passes_of(setting):
        yield (x := settled)
        segments = x.stage == 3 and x.recompute in ("every_k", "sqrt")  # not tiled there (`train.install`)
        tiles = x.tile_tokens is None and x.of_a_pass.local_tokens > TILE_TOKENS and not segments
        if tiles:
            x = replace(x, tile_tokens=TILE_TOKENS)
            yield x
        if x.kv_heads is None and model.kv_heads > x.sp:
            x = replace(x, kv_heads=1)
            yield x
        if tiles:
            yield replace(x, tile_tokens=LEAST_TILE_TOKENS)


def last_resorts(setting: Setting, model: ModelFacts) -> Iterator[Setting]:
    """What `recompute: auto` turns to where keeping attention does not fit: everything again, then segments.

    Not segments under ZeRO-3: there they would be without fused linears and tiles (`train.install`).
    """
    for recompute, every in RECOMPUTE[1:]:
        if recompute == "full" or setting.stage != 3:
            yield from savers(replace(setting, recompute=recompute, every=every), model)


def fastest_saver(model: ModelFacts, setting: Setting, gpu: Gpu, host_gib: float | None = None) -> Setting:
    """The fastest of `savers` that fits: room for kept attention can be worth more than kept linears.

    `auto` becomes `none` where there is room for everything and it is faster: a small model on short packs spends a
    quarter of its step on launching what it computes again.
    """
    found = fastest_of(savers(setting, model), model, gpu, host_gib)
    whole, most = replace(found, recompute="none"), replace(gpu, memory_gib=ROOMY * gpu.memory_gib)
    if found.recompute != "auto" or found.base in STREAMED or not predict(model, whole, gpu).fits(most):
        return found
    return fastest_of((found, whole), model, gpu, host_gib)


def fastest_of(settings: Iterable[Setting], model: ModelFacts, gpu: Gpu, host_gib: float | None = None) -> Setting:
    """The fastest that fits: the earlier one unless a later one gains `WORTH_SAVING`; where none fits, the one that
    needs least of the GPU.
    """
    least_s, least_bytes, chosen = float("inf"), float("inf"), None
    for each in settings:
        memory = predict(model, each, gpu)
        if memory.fits(gpu, host_gib, each.local_world or each.world):
            seconds = predict_time(model, each, gpu, memory.keep).total_s
            if seconds < (1 - WORTH_SAVING) * least_s:
                least_s, chosen = seconds, each
        elif least_s == float("inf") and memory.peak < least_bytes:
            least_bytes, chosen = memory.peak, each
    assert chosen is not None, "nothing to choose from"
    return chosen


@dataclass(frozen=True)
class Plan:
    """One setting with what is predicted of it."""

    setting: Setting
    memory: Memory
    time: StepTime
    ds_config: str  # the shipped JSON it stands for

    @property
    def label(self) -> str:
        """Recomputation and offload in a few words."""
        x = self.setting
        words = [f"every {x.every} layers" if x.recompute == "every_k" else x.recompute]
        if x.tile_tokens:
            words.append("tiles")
        if x.kv_heads:
            words.append("heads in turns")
        if x.passes == "two":
            words.append("two passes")
        if x.base in STREAMED:
            words.append(f"base {x.base}")
        if x.host_gib:
            words.append(f"host {x.host_gib:.0f} GiB")
        if self.memory.disk:
            words.append(f"disk {self.memory.disk * (x.local_world or x.world) / GIB:.0f} GiB")
        return " + ".join([*words, self.ds_config.removeprefix("ds_configs/").removesuffix(".json")])


@dataclass(frozen=True)
class Question:
    """What is asked for: a model on some GPUs, one way to train, whatever is left open."""

    model: ModelFacts
    gpu: Gpu
    gpus: int
    host_gib: float  # of the node
    disk_gib: float = 0.0  # of the node
    disk_gb_s: float = 0.0  # 0: not known
    lora_r: int | None = 16
    lora_experts: bool = False
    pairs: bool = False  # of preferences
    reference: Reference = "none"  # of pairs
    passes: Passes = "auto"  # of pairs; auto: both are considered
    optimizer: str = "adamw"  # as optim.type
    quantize: str = ""  # format of the frozen weights, as `Setting.quantize`
    kernel: str = ""  # "": the GPU's fastest
    fused: bool = True
    targets: float = 1.0
    documents: int = 1  # equal documents of a pack, or equal pairs of one

    @property
    def documents_per_row(self) -> int:
        """A pair is two documents of one pack, each as long as is asked for."""
        return 2 if self.pairs else 1

    def settings(self, *, streamed: bool) -> Iterator[tuple[Setting, str]]:
        """Every way that is considered: sp, DeepSpeed JSON, recomputation, host memory. Lengths are not set yet.

        `streamed`: those in which frozen weights come a layer ahead, or all others.
        """
        m, kernel = self.model, self.kernel or next(iter(self.gpu.attention_tflops))
        lora, of_weights = (
            self.lora_r is not None,
            0 if self.quantize else 2 * m.weights,
        )  # ZeRO-3 divides no packed ones
        resident = stays_resident(of_weights, lora=lora, offload_params=False, memory_gib=self.gpu.memory_gib)
        for sp in (d for d in range(1, self.gpus + 1) if self.gpus % d == 0 and d <= m.most_ranks):
            base = Setting(
                lengths=(LENGTH_STEP,), sp=sp, world=self.gpus, lora_r=self.lora_r, lora_experts=self.lora_experts,
                stage=2 if resident else 3, base="resident" if resident else "engine", quantize=self.quantize,
                resident=False, kernel=kernel, fused=self.fused, targets=self.targets, pairs=self.pairs,
                reference=self.reference, passes=self.passes if self.pairs else "one", optimizer=self.optimizer,
            )  # fmt: skip
            ways, kind = [(base, "ds_configs/zero3_sp.json")], KINDS[self.optimizer]
            if kind.ds_config:  # not under all stages of ZeRO
                ways = [(replace(base, base="engine", stage=max(kind.stages)), kind.ds_config)]
            elif lora and not resident:
                ways.append((replace(base, stage=2), "ds_configs/zero2_sp.json"))
            elif not lora and kind.offload:
                ways.append(
                    (replace(base, offload_optimizer=True, offload_params=True), "ds_configs/zero3_offload.json")
                )
            if streamed:
                ways = [(replace(base, base=b, stage=2), "ds_configs/zero3_sp.json") for b in self.streams(kind.stages)]
            for way, ds_config in ways:
                for recompute, every in RECOMPUTE:
                    for settled in passes_of(replace(way, recompute=recompute, every=every)):
                        yield settled, ds_config
                        left_gib = self.host_gib - (self.base_gib if way.base == "host" else 0)
                        if (left_gib > 0 or self.disk_gib) and not way.offload_params:
                            away = replace(settled, host_gib=max(0.0, left_gib), disk_gib=self.disk_gib)
                            yield replace(away, disk_gb_s=self.disk_gb_s), ds_config

    @property
    def base_gib(self) -> float:
        """Frozen weights of all layers, as they lie."""
        return bytes_of_layers(self.model, Setting(lengths=(1,), quantize=self.quantize)) / GIB

    def streams(self, stages: Sequence[int]) -> list[Base]:
        """Where frozen weights can come from, the faster first; under ZeRO-2."""
        if self.lora_r is None or 2 not in stages:
            return []
        bases: list[Base] = ["sharded"] * (self.gpus > 1)
        bases += ["host"] * (self.host_gib > self.base_gib)
        return bases if self.gpu.all_gather_gb_s > self.gpu.host_gb_s else bases[::-1]

    def at(self, setting: Setting, tokens: int) -> Setting:
        """The same for packs of `tokens`; of pairs, for `tokens` of chosen and as many of rejected documents."""
        share, rest = divmod(tokens, self.documents)
        rows = (share + rest, *(share,) * (self.documents - 1))
        return replace(setting, lengths=tuple(n for n in rows for _ in range(self.documents_per_row)))

    def length(self, setting: Setting) -> int:
        """What `at` was asked for: tokens of a pack, of pairs those of one side."""
        return setting.tokens // self.documents_per_row

    def plan(self, setting: Setting, ds_config: str, tokens: int) -> Plan | None:
        """The prediction at a length, None where it does not fit, or is less than a token for each document."""
        if tokens < self.documents:
            return None
        setting = fastest_saver(self.model, self.at(setting, tokens), self.gpu, self.host_gib)
        memory = predict(self.model, setting, self.gpu)
        if not memory.fits(self.gpu, self.host_gib, self.gpus):
            return None
        return Plan(setting, memory, predict_time(self.model, setting, self.gpu, memory.keep), ds_config)

    def longest(self, setting: Setting, ds_config: str, *, above: int = 0) -> Plan | None:
        """The longest pack that fits, to `LENGTH_STEP` tokens; None where none longer than `above` tokens does."""
        step = max(LENGTH_STEP, setting.sp)
        # Kept tensors only use what is left: they decide the speed of a length, not whether it fits.
        bare = replace(setting, recompute="keep_attention") if setting.recompute == "auto" else setting

        def fits(steps: int) -> bool:
            *_, least = savers(self.at(bare, steps * step), self.model)
            return predict(self.model, least, self.gpu).fits(self.gpu, self.host_gib, self.gpus)

        low, high = above // step, LONGEST // step
        if low and not fits(low + 1):
            return None
        while low < high:
            middle = min((low + high + 1) // 2, 2 * low or high)  # near to what is known to fit
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return self.plan(setting, ds_config, low * step) if low else None


def longest_of_each(question: Question) -> list[Plan]:
    """For each sp, recomputation, offload and number of passes the longest pack, with the JSON that allows most; with
    streamed weights where that is longer than all others of its sp.
    """
    best: dict[tuple[int, str, bool, str, str], Plan] = {}
    for streamed in (False, True):
        lengths = {sp: [question.length(p.setting) for p in best.values() if p.setting.sp == sp] for sp, *_ in best}
        for setting, ds_config in question.settings(streamed=streamed):
            plan = question.longest(setting, ds_config, above=max(lengths.get(setting.sp, [0])))
            if plan is None:
                continue
            key = (setting.sp, setting.recompute, setting.host_gib + setting.disk_gib > 0, setting.passes, setting.base)
            seen = best.get(key)
            if seen is None or plan.setting.tokens > seen.setting.tokens:
                best[key] = plan
    return list(best.values())


def fastest(question: Question, tokens: int) -> Plan | None:
    """The setting that trains most tokens a second at this length; None where nothing fits. Frozen weights are streamed
    where they gain `WORTH_SAVING`, or nothing else fits.
    """

    def best(streamed: bool) -> Plan | None:
        settings = question.settings(streamed=streamed)
        plans = (question.plan(setting, ds_config, tokens) for setting, ds_config in settings)
        return max((p for p in plans if p is not None), key=lambda p: p.time.tokens_per_s, default=None)

    there = best(False)
    away = None if there is not None and there.setting.base == "resident" else best(True)
    if there is None or away is None:
        return there or away
    return away if (1 - WORTH_SAVING) * away.time.tokens_per_s > there.time.tokens_per_s else there


def alternatives(question: Question, plan: Plan) -> dict[str, Plan | None]:
    """Of pairs: the fastest setting at the plan's length with the other number of passes, and with the reference from
    elsewhere, by the key that asks for it; None where nothing fits.
    """
    if not question.pairs:
        return {}
    passes: Passes = "two" if plan.setting.passes == "one" else "one"
    live: Reference = "adapter_off" if question.lora_r is not None else "model"
    reference: Reference = live if question.reference == "precomputed" else "precomputed"
    others = {
        f"dpo.passes: {passes}": replace(question, passes=passes),
        f"dpo.reference: {reference}": replace(question, reference=reference),
    }
    return {key: fastest(other, question.length(plan.setting)) for key, other in others.items()}
