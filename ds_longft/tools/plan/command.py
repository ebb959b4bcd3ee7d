"""`ds-longft plan`: how long a sample fits, how fast it trains, and the recipe for it. Needs no GPU and no weights."""

from __future__ import annotations

import json as json_text
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ds_longft.command_line import RunKeys
from ds_longft.config.model_keys import Quantize
from ds_longft.config.quantized import full_training_problem
from ds_longft.config.run_config import DpoConfig, ModelConfig
from ds_longft.config.section import parse_tokens
from ds_longft.config.train_keys import OptimizerName
from ds_longft.decide.plan_json import as_json, memory_parts
from ds_longft.decide.search import Plan, Question, alternatives, fastest, longest_of_each
from ds_longft.decide.setting import Gpu
from ds_longft.errors import ConfigError, ModelError
from ds_longft.model.facts import ModelFacts
from ds_longft.objectives.objective import reference_of
from ds_longft.tools.plan import plan_text
from ds_longft.tools.plan.asked import ASKED, Asked
from ds_longft.tools.plan.fitting_kernels import with_fitting_kernels

AS_KEYS = {
    "length": "data.max_length_tokens",
    "lora_r": "lora.r",
    "lora_experts": "lora.experts",
    "objective": "objective",
    "reference": "dpo.reference",
    "passes": "dpo.passes",
    "optimizer": "optim.type",
    "quantize": "model.quantize",
    "kernel": "model.kernel",
    "liger": "model.liger",
}
"""Flag -> the key of a run config that says the same."""

FILE_WIDTH = 200
"""Width where the output is no terminal: rows stay on one line, as `grep` and `sort` want them."""


def plan(
    model: RunKeys = "",
    gpus: int = 8,
    gpu: str = "h100-80",
    host_gib: float = 0.0,
    disk_gib: float = 0.0,
    disk_gb_s: float = 0.0,
    lora: bool = False,
    full: bool = False,
    asked: Asked = ASKED,
    optimizer: OptimizerName | None = None,
    quantize: Quantize | None = None,
    documents: int = 1,
    targets: float = 1.0,
    json: bool = False,
    png: str | None = None,
    calibrate: str | None = None,
) -> None:
    """Predict memory and time before a GPU is touched, from the model's config alone.

    Of a model, without --length: the longest pack of each sp, recomputation and offload. With it: the fastest setting
    that fits, as a run config on stdout, and where the memory goes. Formulas and their sources: docs/plan.md.

    Of a run config (mine.yaml, with any of its keys behind it): whether it fits as it is configured, where the memory
    goes and how long a step takes.

    With --objective dpo a pack holds a pair: two documents, prompt and chosen, prompt and rejected answer. Each of them
    has --length tokens (data.max_length_tokens), so the pack has twice as many.

    Args:
        model: folder with a config.json, or a hub id (its config is fetched, no weights); or a run config.
        gpus: GPUs of one node.
        gpu: h200, h100-80, a100-80, ... (a wrong name lists them), or a file that --calibrate wrote.
        host_gib: host memory of the node that may be used; 0 for none.
        disk_gib: disk (NVMe) of the node that may be used for what neither GPUs nor --host_gib hold.
        disk_gb_s: GB/s it writes and reads, for all ranks together; 0 for not known: then nothing waits for it.
        lora: adapters of rank --lora_r on all linears (the default).
        full: train every weight.
        optimizer: as optim.type.
        quantize: as model.quantize.
        documents: equal documents that share a pack and its --length; with dpo equal pairs.
        targets: share of the tokens that have a target.
        json: print one JSON object.
        png: write the memory chart to this file (with --length).
        calibrate: measure this machine's GPU and write the rates to this JSON file (under a minute, needs the GPU).
    """
    if calibrate is not None:
        from ds_longft.tools.plan.calibrate import calibrate as measure

        measure(calibrate)
        return
    words = [model] * bool(model) if isinstance(model, str) else list(model)
    flags = vars(asked) | {"optimizer": optimizer, "quantize": quantize}
    given = {flag: value for flag, value in flags.items() if value is not None and value is not False}
    if words and words[0].endswith((".yaml", ".yml")):
        if lora or (documents, targets, disk_gib, disk_gb_s) != (1, 1.0, 0.0, 0.0):
            raise ConfigError("--lora, --documents, --targets and --disk_gib are for a model alone: leave them out")
        words += [word for flag, value in given.items() for word in (f"--{AS_KEYS[flag]}", str(value))]
        _show_run([*words, *["--lora", "null"] * full], gpus, gpu, host_gib, json=json, png=png)
        return
    more = [word for word in words if word.startswith("-")] or words[1:]
    problems = [f"{w}: a model takes the flags of `ds-longft plan --help`, a run config its keys" for w in more[:1]]
    problems += ["--lora and --full are both given: one of them"] * (lora and full)
    problems += ["--png shows one length: add --length"] * (png is not None and asked.length is None)
    name = words[0] if words else ""
    question, tokens = question_of(
        name, gpus, gpu, host_gib, asked, full=full, optimizer=optimizer or "adamw", quantize=quantize or "auto",
        documents=documents, targets=targets, disk_gib=disk_gib, disk_gb_s=disk_gb_s, found=problems,
    )  # fmt: skip
    if json:
        print(json_text.dumps(answer(question, tokens)))
    elif tokens is not None:
        _show_fastest(question, tokens, name, png=png)
    elif plans := longest_of_each(question):
        width = None if sys.stdout.isatty() else FILE_WIDTH
        Console(soft_wrap=True, highlight=False, width=width).print(plan_text.length_table(plans, question))
    else:
        raise ConfigError(_nothing_fits(question, name))


def _show_run(words: Sequence[str], gpus: int, gpu: str, host_gib: float, *, json: bool, png: str | None) -> None:
    """A run config as it is. Raises ConfigError where it does not fit."""
    from ds_longft.tools.plan.run_plan import in_words, plan_of_run

    found, question = plan_of_run(words, gpus, gpu, host_gib)
    if png:
        plan_text.write_png(found, question, png)
    print(json_text.dumps(as_json(found, question)) if json else in_words(words, found, question))


def answer(question: Question, tokens: int | None) -> dict[str, Any]:
    """For machines: the longest pack of each sp, or the fastest setting of one length and what stands against it."""
    notes = {"notes": of_model} if (of_model := plan_text.estimated(question.model)) else {}
    if tokens is None:
        return {"longest": [as_json(p, question) for p in longest_of_each(question)], **notes}
    best = _fastest(question, tokens)
    instead = {key: p and as_json(p, question) for key, p in alternatives(question, best).items()}
    return as_json(best, question) | ({"instead": instead} if instead else {}) | notes


def _fastest(question: Question, tokens: int) -> Plan:
    """Raises ConfigError where nothing fits."""
    best = fastest(question, tokens)
    if best is None:
        longest = max((question.length(p.setting) for p in longest_of_each(question)), default=0)
        raise ConfigError(
            f"--length {tokens:,}: no setting fits {question.gpus} x {question.gpu.name}; the longest that does is "
            f"{longest:,} tokens{' in each document of a pair' * (question.documents_per_row > 1)}. More GPUs "
            f"(--gpus), host memory (--host_gib) or a shorter sample"
        )
    return best


def _show_fastest(question: Question, tokens: int, model: str, *, png: str | None) -> None:
    """The run config of one length, and where memory and time go. Raises ConfigError where nothing fits."""
    best = _fastest(question, tokens)
    others = alternatives(question, best)
    if png:
        plan_text.write_png(best, question, png)
    print(plan_text.recipe(best, question, model), end="")
    notes = [
        f"peak while at: {best.memory.moment}",
        plan_text.bars(memory_parts(best, question), question.gpu.memory_gib),
        "seconds of a step:",
        "  " + ", ".join(f"{name} {s:.2f}" for name, s in best.time.parts.items()),
        *plan_text.instead(others),
        *plan_text.not_ahead(best),
        *plan_text.estimated(question.model),
    ]
    Console(stderr=True, soft_wrap=True, highlight=False).print("\n".join(notes))


def question_of(
    model: str, gpus: int, gpu: str, host_gib: float, asked: Asked = ASKED, *, full: bool = False,
    optimizer: OptimizerName = "adamw", quantize: Quantize = "auto", documents: int = 1, targets: float = 1.0,
    disk_gib: float = 0.0, disk_gb_s: float = 0.0, found: Sequence[str] = (),
) -> tuple[Question, int | None]:  # fmt: skip
    """The arguments, checked together, and --length in tokens. Raises ConfigError with everything that is wrong, and
    with what the caller has `found`; ModelError where there are no experts to adapt.
    """
    lora_r = None if full else 16 if asked.lora_r is None else asked.lora_r
    reference, passes, kernel = asked.reference or "auto", asked.passes or "auto", asked.kernel or ""
    pairs = asked.objective == "dpo"
    problems = list(found)
    if not model:
        problems.append("--model is missing: a folder with a config.json, or a hub id")
    if gpus < 1:
        problems.append(f"--gpus is {gpus}: at least 1")
    if lora_r is not None and lora_r < 1:
        problems.append(f"--lora_r is {lora_r}: at least 1, or --full for no adapters")
    if min(host_gib, disk_gib, disk_gb_s) < 0 or (disk_gb_s and not disk_gib):
        problems.append(f"--host_gib {host_gib}, --disk_gib {disk_gib}, --disk_gb_s {disk_gb_s}: 0 or more")
    if documents < 1 or not 0 < targets <= 1:
        problems.append(f"--documents is {documents}, --targets {targets}: expected 1 or more, and a share above 0")
    tokens = None if asked.length is None else parse_tokens(asked.length)
    if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
        problems.append(f"--length is {asked.length!r}: give tokens, e.g. 65536, 128K or 1M")
    elif tokens is not None and tokens < documents:
        problems.append(f"--documents is {documents:,}, --length {tokens:,} tokens: a document has at least one")
    wrong, right = ("adapter_off", "model") if full else ("model", "adapter_off")
    if reference == wrong:
        trained = "every weight is" if full else "adapters are"
        problems.append(f"--reference is {reference}, but {trained} trained: {right} or precomputed")
    if not pairs and (reference, passes) != ("auto", "auto"):
        problems.append("--reference and --passes are for preference pairs: add --objective dpo")
    rates = None
    try:
        rates = Gpu.load(gpu)
        if kernel and kernel not in rates.attention_tflops:
            problems.append(f"--kernel is {kernel}: {rates.name} has rates for {', '.join(rates.attention_tflops)}")
    except ConfigError as error:
        problems += error.problems
    if problems or rates is None:
        raise ConfigError(problems)
    facts, form = _described(model, quantize, lora=not full)
    if asked.lora_experts and (full or not facts.experts):
        seen = "--full" if full else facts.model_type
        raise ModelError(f"--lora_experts is for adapters on the experts of a mixture, not for {seen}")
    question = Question(
        model=facts, gpu=with_fitting_kernels(rates, facts, kernel, tokens), gpus=gpus, host_gib=host_gib,
        disk_gib=disk_gib, disk_gb_s=disk_gb_s, lora_r=lora_r, lora_experts=asked.lora_experts,
        pairs=pairs, reference=reference_of(DpoConfig(reference=reference), lora=not full) if pairs else "none",
        passes=passes, optimizer=optimizer, quantize=form, kernel=kernel, fused=asked.liger != "off",
        targets=targets, documents=documents,
    )  # fmt: skip
    return question, tokens


def _described(model: str, quantize: Quantize, *, lora: bool) -> tuple[ModelFacts, str]:
    """Facts of the model, and the format of its base: "" where it is not quantised. Raises ConfigError, ModelError."""
    from ds_longft.model.load import load_config
    from ds_longft.model.load_packed import base_format, stored_as

    asked = ModelConfig(path=model, quantize=quantize)
    hf_config = load_config(asked, 1, attn_implementation="eager")
    base = base_format(hf_config, asked)
    form = base.name if base else ""
    if problem := full_training_problem(form, lora=lora, stored=bool(stored_as(hf_config))):
        raise ConfigError(problem)
    return ModelFacts.from_config(hf_config), form


def _nothing_fits(question: Question, model: str) -> str:
    fewer = f", or fewer than {question.documents:,} documents" if question.documents > 1 else ""
    return (
        f"{model} does not fit on {question.gpus} x {question.gpu.name} at any length: its weights alone are "
        f"{2 * question.model.weights / 2**30:.1f} GiB. More GPUs, --lora, or a GPU with more memory{fewer}"
    )
