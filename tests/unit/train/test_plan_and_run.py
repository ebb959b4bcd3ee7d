"""`ds-longft plan` and a run decide the same: drawn models, GPUs, JSONs, worlds and lengths, asked both ways."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from transformers import AutoConfig

from ds_longft.config.ds_file import load_ds_config
from ds_longft.config.ds_json import merge_ds_config
from ds_longft.config.run_config import RunConfig
from ds_longft.decide.decisions import Decisions
from ds_longft.decide.memory import SPARE_SHARE
from ds_longft.decide.search import Plan, Question
from ds_longft.decide.setting import GIB, Gpu, shipped_gpus
from ds_longft.decide.what_is_kept import place
from ds_longft.layout import ParallelLayout
from ds_longft.model.facts import ModelFacts
from ds_longft.tools.plan.fitting_kernels import with_fitting_kernels
from ds_longft.tools.plan.plan_text import recipe
from ds_longft.train import install
from tests.unit.decide.shapes import LLAMA_8B, QWEN_7B, SMOLLM2, shape

RUNS = 500
CONFIGS = [
    AutoConfig.for_model(**{**of, "num_hidden_layers": layers})  # few layers: a prediction's time goes with them
    for of, layers in (
        (LLAMA_8B, 2),
        (QWEN_7B, 3),
        (SMOLLM2, 4),
        (shape("mistral", sliding_window=4096), 2),
        (shape("gemma2", head_dim=128, attn_logit_softcapping=None), 2),
    )
]
TYPES = {gpu.name: gpu for gpu in map(Gpu.load, shipped_gpus())}
MODELS = [(hf_config, ModelFacts.from_config(hf_config)) for hf_config in CONFIGS]


def draw(rng: random.Random) -> tuple[Question, Any, str, int, Any]:
    """A question, one of the ways that are considered for it with its JSON, a length, and the model's config."""
    hf_config, facts = rng.choice(MODELS)
    objective, lora_r = rng.choice(["sft", "sft", "dpo"]), rng.choice([None, 8, 64])
    live: Any = "adapter_off" if lora_r is not None else "model"
    gpu = rng.choice(list(TYPES.values()))
    question = Question(
        model=facts,
        gpu=with_fitting_kernels(replace(gpu, memory_gib=rng.uniform(0.15, 1.0) * gpu.memory_gib), facts, "", None),
        gpus=rng.choice([1, 2, 4, 8]),
        host_gib=rng.choice([0.0, 20.0, 200.0]),
        lora_r=lora_r,
        pairs=objective == "dpo",
        quantize=rng.choice(["", "nf4", "int8", "fp8"]) if lora_r is not None else "",
        reference=rng.choice([live, "precomputed"]) if objective == "dpo" else "none",
        fused=rng.random() < 0.8,
    )
    ways = [way for streamed in (False, True) for way in question.settings(streamed=streamed)]
    if rng.random() < 0.2:  # what leaves most to be decided
        ways = [way for way in ways if way[0].recompute == "auto"]
    return question, *rng.choice(ways), 1024 * rng.choice([4, 16, 64, 256, 1024]), hf_config


def of_run(content: dict[str, Any], question: Question, plan: Plan, hf_config: Any) -> Decisions:
    """What a run with this config decides on such GPUs."""
    config = RunConfig.model_validate(content)
    raw, hidden = load_ds_config(config.ds_config), question.model.hidden
    settings = merge_ds_config(raw, config, world=question.gpus, device="cuda", hidden_size=hidden)
    layout = cast(ParallelLayout, SimpleNamespace(sp=plan.setting.sp, world=question.gpus))
    run = install.known_run(
        config, settings, layout, torch.device("cuda"),
        hf_config=hf_config, facts=question.model, memory_gib=question.gpu.memory_gib, kernel=plan.setting.kernel,
    )  # fmt: skip
    return install.decided(run, torch.device("cuda"))


def of_plan(plan: Plan, question: Question, host_gib: float) -> Decisions:
    """The plan's choice as a run would have it: on one node, with the host memory that its recipe asks for."""
    x, gpu = replace(plan.setting, local_world=question.gpus, host_gib=host_gib), question.gpu
    room = gpu.memory_gib * (1 - SPARE_SHARE) - gpu.context_gib - gpu.nccl_gib * (question.gpus > 1)
    keep, _ = place(question.model, x, room * GIB)
    return Decisions(x, keep)


def test_plan_and_run_decide_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, compared, left_open = random.Random(0), 0, 0
    while compared < RUNS:
        question, setting, ds_config, tokens, hf_config = draw(rng)
        plan = question.plan(setting, ds_config, tokens)
        if plan is None:  # it does not fit
            continue
        device = SimpleNamespace(name=question.gpu.name, total_memory=TYPES[question.gpu.name].memory_gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, device=device: device)
        monkeypatch.setattr(install, "liger_fits", lambda *_, fused=question.fused: fused)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(question.gpus))
        content = yaml.safe_load(recipe(plan, question, "a/model"))
        host_gib = float(content["train"].get("offload_host_gib", 0))
        assert of_run(content, question, plan, hf_config) == of_plan(plan, question, host_gib)
        compared += 1
        if setting.recompute == "auto":  # the same, left to the run
            content["train"] = {"offload_host_gib": setting.host_gib}
            content.get("dpo", {})["passes"] = setting.passes
            assert of_run(content, question, plan, hf_config) == of_plan(plan, question, setting.host_gib)
            left_open += 1
    assert left_open > RUNS / 10
