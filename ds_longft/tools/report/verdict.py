"""Did it work? The few numbers a reader wants first, before and after, at the length that was trained."""

from __future__ import annotations

import math
from typing import Any

from ds_longft.tools.report.run_facts import Evaluation, RunFacts

Z = 1.96  # 95 %
Row = tuple[str, str, str]
"""What, before, after."""


def verdict(facts: RunFacts) -> list[Row]:
    """One row for each kind of evaluation, and the held-out loss from before step 1 on; empty where there is none."""
    rows = []
    for evaluation in facts.evaluations:
        if not any(evaluation in _other_ways(e, facts) for e in facts.evaluations):
            rows += [(what, *_both(evaluation, key, facts)) for what, key in _asked(evaluation)]
    losses = [record["eval_loss"] for record in facts.held_out]
    if len(losses) > 1 and facts.held_out[0]["step"] == 0:
        rows.append(("held-out loss", f"{losses[0]:.4f}", f"{losses[-1]:.4f}"))
    return rows


def cost(facts: RunFacts) -> str:
    """GPU hours of the steps, e.g. `0.6 GPU hours (8 x H100)`; empty where nothing was trained."""
    world, device = facts.machine.get("world") or 1, str(facts.machine.get("device") or "unknown")
    hours = world * facts.steps_s / 3600
    if not hours:
        return ""
    return f"{hours:.3g} {'CPU process' if device.lower() == 'cpu' else 'GPU'} hours ({world} x {device})"


def duration(facts: RunFacts) -> str:
    """Time of the steps, of the start before them, and when it ended, e.g. `8.0 min of steps, 1.1 min of start-up`."""
    parts = [
        f"{s / 60:.1f} min of {what}" for s, what in ((facts.steps_s, "steps"), (facts.start_up_s, "start-up")) if s
    ]
    return ", ".join(parts) + (f"; ended {facts.ended}" if facts.ended else "")


def _asked(evaluation: Evaluation) -> list[tuple[str, Any]]:
    """(words, key of the number) of an evaluation."""
    result: dict[str, Any] = evaluation.after or evaluation.before or {}
    kind = evaluation.kind
    if kind == "perplexity":
        return [(f"loss in the last eighth of {result['length_tokens']:,} tokens, nats per token", "loss_by_eighth")]
    if kind.startswith("needle"):
        longest = {lang: max(sizes, key=int) for lang, sizes in result["exact_percent"].items() if sizes}
        many = "facts found whole" if kind != "needle" else "hidden facts found"
        return [(f"{many} in {int(n):,} tokens, {lang}", (lang, n)) for lang, n in longest.items()]
    if kind == "short":
        return [("short questions right", "right_percent")]
    if kind == "ruler":
        length = max(map(int, result["averages"]))
        return [(f"RULER at {length:,} tokens, mean of the tasks, %", str(length))]
    if kind.startswith(("longbench", "longproc")):
        return [(f"{evaluation.name}, {name}", name) for name in result["averages"]]
    return []


def _both(evaluation: Evaluation, key: Any, facts: RunFacts) -> tuple[str, str]:
    results = (evaluation.before, evaluation.after)
    before, after = (_shown(evaluation.kind, r, key) if r else "not measured" for r in results)
    others = [_shown(other.kind, other.before or {}, key) for other in _other_ways(evaluation, facts)]
    return "; ".join([*others, before]), after


def _other_ways(evaluation: Evaluation, facts: RunFacts) -> list[Evaluation]:
    """The base's losses on the same text read in another way (whole, in windows): they belong into the same row."""
    if evaluation.kind != "perplexity" or evaluation.after is None:
        return []
    text = (evaluation.after["length_tokens"], evaluation.after["settings"].get("text"))
    alone = [(e, e.before) for e in facts.evaluations if e.kind == "perplexity" and e.after is None and e.before]
    return [e for e, before in alone if (before["length_tokens"], before["settings"].get("text")) == text]


def _shown(kind: str, result: dict[str, Any], key: Any) -> str:
    if kind == "perplexity":
        value = result["loss_by_eighth"][-1]
        window = result["settings"].get("window_tokens")
        return "-" if value is None else f"{value:.3f}" + (f" in windows of {window:,}" if window else "")
    if kind.startswith("needle"):
        value = result["exact_percent"].get(key[0], {}).get(key[1])
        asked = result["settings"].get("trials", 1) * len(result["settings"].get("depths") or [0])
        return "-" if value is None else f"{value:.0f} %{interval(value, asked)}"
    if kind == "short":
        return f"{result['right_percent']:.0f} %{interval(result['right_percent'], result.get('questions') or 0)}"
    if result["averages"].get(key) is None:
        return "-"
    ends = " ({:.0f} to {:.0f})".format(*result["intervals"][key]) if key in result["intervals"] else ""
    return f"{result['averages'][key]:.1f}{ends}"


def interval(percent: float, n: int) -> str:
    """Wilson's 95 % interval of a share of `n` answers, ` (83 to 100)`; empty without a count."""
    if n < 1:
        return ""
    p, square = percent / 100, Z * Z / n
    middle = (p + square / 2) / (1 + square)
    half = Z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    return f" ({100 * max(0.0, middle - half):.0f} to {100 * min(1.0, middle + half):.0f})"
