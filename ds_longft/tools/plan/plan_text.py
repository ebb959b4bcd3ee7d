"""A plan for its reader: the table of longest lengths, the recipe, and the chart of where the memory goes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ds_longft.config.yaml_io import dump_yaml
from ds_longft.decide.held import STREAMED
from ds_longft.decide.plan_json import FREE, memory_parts
from ds_longft.decide.setting import GIB
from ds_longft.decide.time import WIDER_HEADS, WIDEST_HEADS
from ds_longft.errors import ConfigError
from ds_longft.sequence.kernels.torch_builtin import WideHeads

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ds_longft.decide.search import Plan, Question
    from ds_longft.decide.setting import Setting
    from ds_longft.model.facts import ModelFacts

LEARNING_RATES = {(False, True): 1e-4, (False, False): 1e-5, (True, True): 5e-6, (True, False): 5e-7}
"""Where to begin, by whether rows are pairs and whether adapters are trained."""

MUON_RATE = 0.02  # DeepSpeed's default

BAR = 40  # characters of the GPU's whole memory

PAIRS = "a pair is two documents of this length, prompt and chosen and prompt and rejected answer, in one pack"


def length_table(plans: list[Plan], question: Question) -> Table:
    """Longest pack of each way, most tokens first within each sp; of pairs, the longest documents."""
    gpu, window, pairs = question.gpu, question.model.max_positions, question.pairs
    caption = [f"{gpu.name} ({gpu.source}); reserve of 6 % not used; tokens/s of all {question.gpus} GPUs"]
    if window:
        caption.append(f"the model's window is {window:,} tokens; for longer documents set model.rope.type")
    if pairs:
        caption.append(f"{PAIRS}; reference: {question.reference}; one pass where not said")
    caption += estimated(question.model)
    longest = "longest documents" if pairs else "longest pack"
    columns = ("sp", longest, "recomputation, JSON", "peak GiB", "host GiB", "step s", "tokens/s")
    table = Table(*columns, caption="\n".join(caption))
    for p in sorted(plans, key=lambda p: (p.setting.sp, -p.setting.tokens)):
        host_gib = p.memory.host * p.setting.world / GIB
        numbers = (
            f"{p.memory.peak_gib:.1f}",
            f"{host_gib:.0f}",
            f"{p.time.total_s:.1f}",
            f"{p.time.tokens_per_s:,.0f}",
        )
        table.add_row(str(p.setting.sp), f"{question.length(p.setting):,}", p.label, *numbers)
    return table


def bars(parts: dict[str, float], total_gib: float) -> str:
    """A line for each part: name, bar, GiB."""
    width = max(map(len, parts))
    return "\n".join(
        f"  {name:<{width}} {'#' * round(BAR * gib / total_gib):<{BAR}} {gib:7.1f} GiB" for name, gib in parts.items()
    )


def write_png(plan: Plan, question: Question, path: str | Path) -> None:
    """The same as one stacked bar, a PNG. Raises ConfigError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = 0.0
    for name, gib in memory_parts(plan, question).items():
        (bar,) = axes.barh([0], [gib], left=left, label=f"{name} {gib:.1f}")
        if name == FREE:
            bar.set(facecolor="white", edgecolor="gray", hatch="//")
        left += gib
    x = plan.setting
    axes.set(yticks=[], xlabel="GiB", xlim=(0, question.gpu.memory_gib))
    axes.set_title(
        f"{length_in_words(plan, question)}, sp {x.sp}, {plan.label}, {question.gpu.name}, at {plan.memory.moment}",
        fontsize=9,
    )
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35), fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"--png {path} cannot be written: {error.strerror}") from None


def length_in_words(plan: Plan, question: Question) -> str:
    """Tokens of a pack; of pairs those of its documents too."""
    tokens = f"{plan.setting.tokens:,} tokens"
    return f"pairs of 2 x {question.length(plan.setting):,} = {tokens}" if question.pairs else tokens


def recipe(plan: Plan, question: Question, model: str) -> str:
    """The plan as a run config, ready but for the data."""
    x, gpu = plan.setting, question.gpu
    max_length, window = question.length(x), question.model.max_positions
    stretched = bool(window) and max_length > window
    kept_gib = plan.memory.host * x.world / GIB - (question.base_gib if x.base == "host" else 0.0)
    pairs = {"objective": "dpo", "dpo": {"reference": x.reference, "passes": x.passes}}
    content: dict[str, Any] = {
        "ds_config": plan.ds_config,
        "output_dir": "runs/planned",
        "sp": x.sp,
        **(pairs if question.pairs else {}),
        "model": _chosen(
            path=model,
            kernel=question.kernel,
            liger="" if question.fused else "off",
            base=x.base if x.base in STREAMED else "",
            quantize=x.quantize if x.quantize != "mxfp4" else "",
            rope={"type": "abf"} if stretched else {},
        ),
        "lora": None if x.lora_r is None else _chosen(r=x.lora_r, alpha=2 * x.lora_r, experts=x.lora_experts),
        "data": {"train": ["data/train.jsonl"], "max_length_tokens": max_length},
        "optim": _optim(x, LEARNING_RATES[question.pairs, x.lora_r is not None]),
        "train": _chosen(
            recompute=x.recompute,
            recompute_every=x.every if x.recompute == "every_k" else 0,
            offload_host_gib=min(x.host_gib, math.ceil(kept_gib)) if kept_gib > 0 else 0,
            offload_disk="/path/on/nvme" if plan.memory.disk else "",
            mlp_tile_tokens=x.tile_tokens,
            kv_heads_at_a_time=x.kv_heads,
        ),
    }
    head = (
        f"# Planned for {question.gpus} x {gpu.name} ({gpu.source}), {length_in_words(plan, question)} per pack:\n"
        f"# peak {plan.memory.peak_gib:.1f} of {gpu.memory_gib:.1f} GiB, {plan.time.total_s:.1f} s per step "
        f"with {x.kernel}, {plan.time.tokens_per_s:,.0f} tokens/s of all GPUs, {x.dp} "
        f"pack{'s' * (x.dp > 1)} per step.\n"
    )
    if stretched:
        head += (
            f"# The model's window is {window:,} tokens: model.rope stretches it, and training has to teach its use.\n"
        )
    if x.reference == "precomputed":
        head += "#   ds-longft data ref_logps this.yaml --data.train my.jsonl\n"
    return head + "#   deepspeed launch/train.py this.yaml --data.train my.jsonl\n" + dump_yaml(content)


def _chosen(**keys: Any) -> dict[str, Any]:
    """Those keys that are set."""
    return {key: value for key, value in keys.items() if value}


def _optim(x: Setting, adam: float) -> dict[str, Any]:
    """Where to begin; `adam`: AdamW's learning rate."""
    named = {} if x.optimizer == "adamw" else {"type": x.optimizer}
    if x.optimizer == "muon":
        beside = {"adam_learning_rate": adam} if x.lora_r is None else {}
        return {**named, "learning_rate": MUON_RATE, **beside, "max_grad_norm": None}
    return {**named, "learning_rate": adam, **({"schedule": "constant"} if x.optimizer == "schedule_free" else {})}


def instead(others: Mapping[str, Plan | None]) -> list[str]:
    """A line for each key of `search.alternatives`."""
    lines = [
        f"  {key}: {p.time.tokens_per_s:,.0f} tokens/s, peak {p.memory.peak_gib:.1f} GiB, sp {p.setting.sp}, {p.label}"
        if p
        else f"  {key}: does not fit"
        for key, p in others.items()
    ]
    return ["the fastest at this length with", *lines] if lines else []


def estimated(model: ModelFacts) -> list[str]:
    """What of a plan nobody has measured: layers that carry a state, and heads wider than the measured kernels do."""
    lines = []
    if any(f.state for f in model.layer_facts):
        attend = sum(f.attends for f in model.layer_facts)
        lines = [
            f"{attend} of {model.layers} layers have softmax attention: there time grows with the square of the",
            "length, and model.rope stretches no other. Time of layers with a state is an estimate",
        ]
    if any(f.state and f.state.kind == "scan" for f in model.layer_facts):
        lines.append("Mamba-1 runs in torch, a piece of the tokens at a time: its time was never measured on a GPU")
    if wide := [d for _, d in model.attentions if d > WIDEST_HEADS]:
        lines += [
            f"{len(wide)} of {model.layers} layers have heads of {max(wide)}: {WideHeads.name} works on them, whose",
            f"rate nobody has measured. {WIDER_HEADS:g} of the other kernel's is a guess: time may be far off",
        ]
    return lines


def not_ahead(plan: Plan) -> list[str]:
    """What a live reference costs beside its pass, where ZeRO-3 gathers weights in each pass.

    DeepSpeed keeps one order of modules, from one pass to the next. A second model's never fits the model's; without
    adapters it is the beginning of the model's, but in one pass it is what DeepSpeed learns, and then it is too short.
    """
    x = plan.setting
    alike = x.reference == "adapter_off" and x.passes == "two"
    if x.reference not in ("adapter_off", "model") or alike or x.stage < 3 or x.resident or x.world == 1:
        return []
    return [
        "with this reference DeepSpeed forgets the order of the weights in each step of ZeRO-3 and fetches them when",
        "they are needed, not ahead; dpo.reference: precomputed has them fetched ahead",
    ]
