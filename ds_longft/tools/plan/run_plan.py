"""`ds-longft plan mine.yaml`: does this run fit as it is configured, and how fast is it, on GPUs that need not be here.

The judgement is the run's own (`decide`), asked for another GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from ds_longft.config.ds_file import load_ds_config, stage_asked
from ds_longft.config.ds_json import merge_ds_config
from ds_longft.config.preflight import resolve_sp
from ds_longft.config.read import load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.data.pack_plan import costs_of, plan_epoch
from ds_longft.data.progress import duration
from ds_longft.data.tokenize import tokenized_already
from ds_longft.decide.advice import Adviser
from ds_longft.decide.decisions import Run, decide
from ds_longft.decide.memory import predict
from ds_longft.decide.plan_json import memory_parts
from ds_longft.decide.search import Plan, Question
from ds_longft.decide.setting import Gpu
from ds_longft.decide.time import predict_time
from ds_longft.decide.where_base_lies import settle_base, stage_2, with_room
from ds_longft.errors import ConfigError, LongftError
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load import load_config
from ds_longft.model.load_packed import base_format
from ds_longft.model.read_model import load_tokenizer
from ds_longft.tools.plan import plan_text
from ds_longft.tools.plan.fitting_kernels import with_fitting_kernels


def plan_of_run(words: Sequence[str], gpus: int, gpu: str, host_gib: float) -> tuple[Plan, Question]:
    """The longest pack of a run config on `gpus` GPUs of one node, and the question that it answers.

    Raises ConfigError: a mistake in the config, or a pack that does not fit, with what would save memory.
    """
    if gpus < 1:
        raise ConfigError(f"--gpus is {gpus}: at least 1")
    config = load_run_config(words)
    run = _known(config, gpus, Gpu.load(gpu), host_gib)
    setting = decide(run).setting
    memory = predict(run.facts, setting, run.gpu)
    question = Question(
        run.facts, run.gpu, gpus, host_gib, lora_r=setting.lora_r, pairs=config.pairs, quantize=setting.quantize
    )
    found = Plan(setting, memory, predict_time(run.facts, setting, run.gpu, memory.keep), config.ds_config)
    if not memory.fits(run.gpu):
        savings = [f"  {key}   saves about {saved:.1f} GiB{note}" for key, saved, note in Adviser(run).savings()]
        lines = [
            f"{' '.join(words)} does not fit on {gpus} x {run.gpu.name}: {plan_text.length_in_words(found, question)} "
            f"a pack need {memory.peak_gib:.1f} GiB, of {run.gpu.memory_gib:.1f} on a GPU ({_way(found)})",
            *savings,
            f"  or ask for the fastest way that fits: ds-longft plan {config.model.path} --gpus {gpus} --gpu {gpu} "
            f"--length {config.data.max_length_tokens}",
        ]
        raise ConfigError("\n".join(lines))
    return found, question


def _known(config: RunConfig, gpus: int, gpu: Gpu, host_gib: float) -> Run:
    """The run as `train.install.known_run` would tell it on that machine. Neither data nor weights have to be there."""
    if not config.model.path:
        raise ConfigError("model.path is empty: give a folder with a config.json, or a hub id such as Qwen/Qwen3-8B")
    hf_config = load_config(config.model, config.data.max_length_tokens, attn_implementation="eager")
    facts = ModelFacts.from_config(hf_config)
    raw = load_ds_config(config.ds_config)
    settings = merge_ds_config(
        raw, config, world=gpus, device="cuda", hidden_size=getattr(hf_config, "hidden_size", None)
    )
    sp = resolve_sp(config, settings, gpus, gpus)
    if sp > facts.most_ranks:
        raise ConfigError(f"sp is {sp}, but the model has heads for {facts.most_ranks} GPUs: set --sp, or --gpus")
    kernel = config.model.kernel if config.model.kernel in gpu.attention_tflops else ""
    gpu = with_fitting_kernels(gpu, facts, kernel, config.data.max_length_tokens)
    form = base_format(hf_config, config.model)
    base, why = settle_base(settings, config, facts, gpu.memory_gib, None, form.name if form else "")
    run = Run(
        config=config, engine_config=settings.engine, hf_config=hf_config, facts=facts, sp=sp, world=gpus,
        local_world=gpus, gpu=gpu, has_rates=True, kernel=kernel, fused=config.model.liger == "auto", base=base,
        why=why,
    )  # fmt: skip
    zero = settings.engine["zero_optimization"]
    if not settings.resident_if_fits or config.model.base != "auto" or "offload_param" in zero:
        return run
    found = with_room(run, host_gib)
    if found.base != run.base:
        stage_2(zero)
    return replace(found, engine_config=settings.engine)


def in_words(words: Sequence[str], plan: Plan, question: Question) -> str:
    """What there is to say of a run that fits, for a terminal."""
    x, gpu = plan.setting, question.gpu
    packs = f"{x.dp * x.accumulation} packs" if x.dp * x.accumulation > 1 else "one pack"
    return "\n".join(
        (
            f"{' '.join(words)} fits on {question.gpus} x {gpu.name} ({gpu.source}): {_way(plan)}",
            f"peak {plan.memory.peak_gib:.1f} of {gpu.memory_gib:.1f} GiB, while at: {plan.memory.moment}",
            plan_text.bars(memory_parts(plan, question), gpu.memory_gib),
            f"a step of {packs} of {plan_text.length_in_words(plan, question)}: "
            f"{x.accumulation * plan.time.total_s:.1f} s with {x.kernel}, {plan.time.tokens_per_s:,.0f} tokens/s of "
            "all GPUs; shorter documents in a pack take less",
            *_epoch_in_words(words, plan, question.model),
            *plan_text.estimated(question.model),
        )
    )


def _way(plan: Plan) -> str:
    x = plan.setting
    whole = "; frozen weights stay whole on each GPU" * (x.base == "resident" or x.resident)
    return f"sp {x.sp} x dp {x.dp}, {stage_asked(plan.ds_config)}, recomputation {plan.label}{whole}"


def _epoch_in_words(words: Sequence[str], found: Plan, model: ModelFacts) -> list[str]:
    """`an epoch is 1,679 steps, about 5.7 hours`; how to learn it, where rows lie here that nobody has tokenized.

    Of a plan whose step is one of full packs. A pack of shorter documents takes less, as its attention does.
    """
    run, x = load_run_config(words), found.setting
    here = bool(run.data.train) and all(Path(source.path).expanduser().exists() for source in run.data.train)
    if not here or run.data.stream_window_mib is not None:
        return []
    with suppress(LongftError):  # rows that cannot be trained on are refused by a start; a plan is of memory and time
        rows = tokenized_already(run.data.train, load_tokenizer(run.model), run.data, pairs=run.pairs)
        if rows is None:
            return [f"how long an epoch takes is known once `ds-longft data tokenize {words[0]}` has counted the rows"]
        lengths = rows.lengths[rows.lengths > 0][: round(len(rows) * (1 - run.data.eval_fraction))]
        cost_tokens = model.equal_cost_tokens(lora=run.lora is not None)
        plan = plan_epoch(
            lengths, budget_tokens=run.budget_tokens, dp=x.dp, accumulation=x.accumulation, seed=run.seed, epoch=0,
            packing=run.data.packing, equal_cost_tokens=cost_tokens,
        )  # fmt: skip
        documents = np.full(rows.documents_per_row, run.budget_tokens // rows.documents_per_row)
        of_full = costs_of(documents, cost_tokens).sum() * len(plan.packs)
        share = float(costs_of(rows.document_lengths[: len(lengths)].ravel(), cost_tokens).sum() / of_full)
        step_s = x.accumulation * found.time.total_s * share
        return [f"an epoch is {len(plan):,} steps of {step_s:.3g} s on average, about {duration(len(plan) * step_s)}"]
    return []
