"""The facts of a run as rows of words: the page and the model card show the same ones."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ds_longft.tools.report.run_facts import Evaluation, RunFacts
from ds_longft.train.smooth import first_and_last

Pairs = list[tuple[str, str]]
KINDS_OF_RIGHT = (("exact", "all right"), ("found", "of the facts"))  # of needles: key of a result, and in words


def overview(facts: RunFacts) -> Pairs:
    """What was trained on what, in which layout."""
    config, machine = facts.config, facts.machine
    lora = config.lora
    rope = config.model.rope
    given = {"factor": rope.factor, "theta": rope.theta, "attention factor": rope.attention_factor}
    stretched = ", ".join(f"{key} {value:g}" for key, value in given.items() if value is not None)
    dpo = config.dpo if config.pairs else None
    weighting = f"{config.data.weighting} weighting" if dpo is None else "every pair by its weight"
    alone = " (longer rows alone)" if config.budget_tokens < config.longest_pack_tokens else ""
    world, sp = machine.get("world"), machine.get("sp")
    zero = facts.engine.get("zero_optimization", {}).get("stage")
    pairs = [
        ("base model", config.model.path),
        ("trained", f"LoRA r {lora.r}, alpha {lora.alpha:g}, {_list(lora.targets)}" if lora else "all weights"),
        ("longest sample", f"{config.data.max_length_tokens:,} tokens"),
        ("RoPE", rope.type + (f" ({stretched})" if stretched else "") if rope.type != "none" else "the model's own"),
        ("pack", f"{config.budget_tokens:,} tokens{alone}, {config.data.packing}, {weighting}"),
        ("learning rate", f"{config.optim.learning_rate:g}, {config.optim.schedule}"),
        ("recomputation", config.train.recompute),
        ("seed", str(config.seed)),
    ]
    if dpo is not None:
        told = f"{dpo.loss}, beta {dpo.beta:g}, reference {dpo.reference}, passes {dpo.passes}"
        pairs.insert(1, ("objective", f"DPO: {told}"))
    if world:
        parts = {"sp": sp, "dp": machine.get("dp"), "ZeRO": zero}
        known = ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)
        pairs.insert(4, ("layout", f"{world} x {machine.get('device') or 'unknown'}" + (f": {known}" if known else "")))
    return pairs


def progress(facts: RunFacts) -> Pairs:
    """Where the training stands, in numbers."""
    steps = [r for r in facts.steps if r.get("loss") is not None]
    if not facts.steps:
        return []
    newest = facts.steps[-1]
    total = f" of {facts.total_steps}" if facts.total_steps else ""
    pairs = [("step", f"{newest['step']}{total}"), ("tokens seen", f"{newest.get('tokens_seen') or 0:,}")]
    if steps:
        n, first, last = first_and_last([r["loss"] for r in steps])
        pairs.append(("training loss", f"{first:.4f} → {last:.4f}" + (f" (means of {n})" if n > 1 else "")))
    if facts.held_out:
        values = [r["eval_loss"] for r in facts.held_out]
        pairs.append(("held-out loss", " → ".join(f"{v:.4f}" for v in dict.fromkeys((values[0], values[-1])))))
    timed = facts.steps[1:] or facts.steps  # the first step warms up
    pairs += [
        ("speed", f"{fmean(_known(timed, 'tokens_per_s_per_gpu')):,.0f} tokens/s per rank"),
        ("peak memory", f"{max(_known(facts.steps, 'peak_gib')):.1f} GiB per rank"),
        ("padding", f"{fmean(_known(facts.steps, 'padding_percent')):.1f} %"),
        ("time in steps", f"{facts.steps_s / 60:.1f} min"),
    ]
    if skipped := sum("skipped" in r for r in facts.steps):
        pairs.append(("skipped steps", f"{skipped} (not finite)"))
    if spikes := [r["step"] for r in facts.steps if "loss_spike" in r]:
        pairs.append(("loss spikes", f"{len(spikes)}, the last at step {spikes[-1]}"))
    return pairs


def _known(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Values of a key that may be missing in some records; never empty."""
    return [r[key] for r in records if r.get(key) is not None] or [0.0]


def data_rows(statistics: dict[str, Any]) -> Pairs:
    """Statistics of one set."""
    words = {"bad_rows": "bad", "overlong_rows_dropped": "too long", "truncated_rows": "cut in the middle"}
    left_out = [f"{statistics[key]:,} {word}" for key, word in words.items() if statistics.get(key)]
    pairs = [
        ("rows", f"{statistics['rows']:,}"),
        ("tokens", f"{statistics['tokens']:,}"),
        ("targets", f"{statistics['targets']:,} ({100 * statistics['target_share']:.1f} %)"),
        ("median length", f"{statistics['median_tokens']:,} tokens"),
        ("longest", f"{statistics['longest_tokens']:,} tokens"),
        ("sources", _counts(statistics.get("sources", {}))),
    ]
    if statistics.get("languages"):
        pairs.append(("languages", ", ".join(f"{name} {count:,}" for name, count in statistics["languages"].items())))
    if statistics.get("bad_rows") is not None:
        pairs.append(("left out or cut, of all rows read", ", ".join(left_out) or "none"))
    return [*pairs, ("fingerprint", statistics.get("fingerprint", ""))]


def data_line(facts: RunFacts) -> str:
    """The training set in one line; empty where nothing is known of it."""
    for name, s in facts.data.items():
        if name.startswith("train"):
            share = f"{100 * s['target_share']:.1f} % of them trained"
            return f"{s['rows']:,} rows, {s['tokens']:,} tokens, {share}; {_counts(s.get('sources', {}))}".rstrip("; ")
    return ""


def _counts(sources: dict[str, int]) -> str:
    return "; ".join(f"{name}: {count:,}" for name, count in sources.items())


def evaluation_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of one evaluation; rows are the same figure before and after, with the difference."""
    if evaluation.kind == "suite":
        return suite_rows(evaluation.pair[-1][1])
    values = {label: _figures(result) for label, result in evaluation.pair}
    names = list(dict.fromkeys(name for figures in values.values() for name in figures))
    both = len(values) == 2
    rows = []
    for name in names:
        cells = [figures.get(name) for figures in values.values()]
        digits = 1 if name.endswith("%") else _digits(evaluation)
        row = [name, *("–" if cell is None else f"{cell:.{digits}f}" for cell in cells)]
        if both:
            before, after = cells
            row.append("" if before is None or after is None else f"{after - before:+.{digits}f}")
        rows.append(row)
    return ["", *values, *["difference"] * both], rows


def suite_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a suite: each figure with its 95 % interval."""
    columns = ["", "before", "after", "difference (95 %)", "rows"]
    return columns, [
        [
            one["name"],
            *(_interval(one[key], 1 if one["name"].endswith("%") else 3) for key in ("before", "after", "difference")),
            str(one["rows"]),
        ]
        for one in result["measures"]
    ]


def _interval(ends: Sequence[float], digits: int) -> str:
    mean, low, high = (f"{value:.{digits}f}" for value in ends)
    return f"{mean} ({low} to {high})"


def _digits(evaluation: Evaluation) -> int:
    if evaluation.kind == "ruler" or evaluation.kind.startswith("needle"):
        return 1
    return 2 if evaluation.kind.startswith(("longbench", "longproc")) else 3


def _figures(result: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a result by the words they are shown under."""
    kind = result["kind"]
    if kind == "perplexity":
        tokens, eighths = result["length_tokens"], result["loss_by_eighth"]
        edges = [i * tokens // len(eighths) for i in range(len(eighths) + 1)]
        figures = {f"loss {edges[i]:,} – {edges[i + 1]:,}": value for i, value in enumerate(eighths)}
        longppl = {f"LongPPL, {result['key_tokens']:,} key tokens": result["longppl"]} if result.get("longppl") else {}
        return figures | {"loss, all positions": result["loss"], **longppl}
    if kind.startswith("needle"):
        return {
            f"{int(size):,} tokens, {language}: {words}, %": value
            for what, words in KINDS_OF_RIGHT[: 1 if kind == "needle" else 2]
            for language, sizes in result[f"{what}_percent"].items()
            for size, value in sizes.items()
        }
    if kind == "short":
        length = result["length_tokens"]
        return {f"loss of {length}-token texts": result["loss"], "short questions right, %": result["right_percent"]}
    if kind == "ruler":
        means = {f"{int(size):,}: mean of the tasks, %": value for size, value in result["averages"].items()}
        return means | {
            f"{int(size):,}: {task}": value
            for task, sizes in result["by_length"].items()
            for size, value in sizes.items()
        }
    if kind.startswith(("longbench", "longproc")):
        lengths = {
            f"{task} {bucket}": value
            for task, buckets in result.get("by_length", {}).items()
            for bucket, value in buckets.items()
        }
        return {**result["averages"], **result["scores"], **lengths}
    return {}


def settings_line(result: dict[str, Any]) -> str:
    """How a result was made, in one line."""
    shown = {k: v for k, v in result["settings"].items() if k != "weights" and v not in (None, False, [])}
    return "; ".join(f"{key.replace('_', ' ')} {_list(value)}" for key, value in shown.items())


def differences_line(evaluation: Evaluation) -> str:
    """Which settings before and after do not share; empty where they share all."""
    told = [f"{name.replace('_', ' ')} {_list(a)} and {_list(b)}" for name, (a, b) in evaluation.differences.items()]
    return f"Before and after were made with different settings: {'; '.join(told)}." if told else ""


def _list(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {v}" for key, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_list(v) for v in value)
    return str(value)


def reproduce(facts: RunFacts) -> list[str]:
    """Commands that make the run and its evaluations again, quoted for a shell."""
    again, sp = f"{facts.folder}-again", str(facts.machine.get("sp") or 1)
    config = str(facts.folder / "config.yaml")
    gpus = ["--gpus", str(facts.machine.get("world") or 1)]
    commands = [["train", config, *gpus, "--sp", sp, "--output_dir", again]]
    for evaluation in facts.evaluations:
        for label, result in evaluation.pair:
            kind = result["kind"]
            words = _needle_words if kind.startswith("needle") else _text_words
            called = "longbench run" if kind.startswith("longbench") else kind.partition("-")[0]
            name = ["--name", evaluation.name] if evaluation.name != kind else []
            before = ["--before"] if label == "before" else []
            commands.append(["eval", *called.split(), again, *words(result["settings"]), *name, *before])
    return [shlex.join(["ds-longft", *command]) for command in commands]


def _needle_words(settings: dict[str, Any]) -> list[str]:
    flags = {key: _list(settings[key]).replace(" ", "") for key in ("lengths", "trials", "languages", "seed")}
    if settings["form"] == "single":
        flags["depths"] = ",".join(f"{100 * depth:g}" for depth in settings["depths"])
    else:
        flags |= {"form": str(settings["form"]), "facts": str(settings["facts"])}
    flags |= {f"haystack_{k}": str(path) for k, path in settings["haystacks"].items() if path != "built in"}
    if settings.get("where"):
        flags["where"] = str(settings["where"])
    return [word for flag, value in flags.items() for word in (f"--{flag}", value)]


def _text_words(settings: dict[str, Any]) -> list[str]:
    same = (
        "text", "texts", "buckets", "where", "data", "prompts", "tasks", "limit", "lengths", "rows", "essays", "squad",
        "hotpotqa", "seed", "preset", "longproc_data", "key_tokens",
    )  # fmt: skip
    flags = {f"{flag}_tokens": flag for flag in ("length", "window", "short")} | {"max_length_tokens": "max_length"}
    flags |= dict(zip(same, same, strict=True))
    words = [f"--{flag}" for flag in ("join", "e", "run_code") if settings.get(flag)]
    for key, flag in flags.items():
        value = settings.get(key)
        if str(value).startswith("built in"):
            words += ["--language", str(value).rpartition(" ")[2]]
        elif value is not None:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words
