"""RUN/plan.json: what the planner foresees of a run that is about to start, for the report to lay beside what came."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_longft.decide.decisions import Decisions, Run
from ds_longft.decide.memory import predict
from ds_longft.decide.search import Plan, Question
from ds_longft.decide.setting import GIB, Gpu, shipped_gpus
from ds_longft.decide.time import predict_time

MADE_BY = "made_by"
US = "the run itself, when it started"
SAME_MEMORY = 0.05  # of what the type has: drivers reserve a little more or less
FREE, OUTSIDE = "free", "CUDA and NCCL"
TIMES = ("step_s", "step_parts_s", "tokens_per_s", "rates")


def write_plan(folder: Path, foreseen: dict[str, Any] | None) -> None:
    """Write plan.json, or take away that of an earlier start. One that the user put there stays."""
    file = folder / "plan.json"
    if file.exists() and f'"{MADE_BY}"' not in file.read_text(encoding="utf-8", errors="replace"):
        return
    if foreseen is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps({MADE_BY: US, **foreseen}, indent=1) + "\n", encoding="utf-8")


def note_in_plan(folder: Path, given_back: dict[str, float]) -> None:
    """Add to our plan.json what a full GPU gave back: the run goes on with less kept than was planned.

    A user's own plan stays as it is, and training goes on where the file cannot be read or written.
    """
    file, new = folder / "plan.json", folder / ".plan.json"
    with suppress(OSError, ValueError):
        plan = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(plan, dict) and plan.get(MADE_BY) == US:
            plan.setdefault("given_back", []).append(given_back)
            new.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
            new.replace(file)


def foresee_run(run: Run, decisions: Decisions) -> dict[str, Any] | None:
    """What `ds-longft plan --json` prints, for this run: the longest pack as one document, every token a target.

    Seconds only for GPU types that have rates of its kernel. None of pairs.
    """
    model, gpu = run.facts, run.gpu
    if run.config.pairs:
        return None
    setting, has_rates = replace(decisions.setting, kernel=run.kernel), run.has_rates
    has_rates = has_rates and run.kernel in gpu.attention_tflops
    memory = predict(model, setting, gpu)
    rated = setting if has_rates else replace(setting, kernel=gpu.kernels[0])
    plan = Plan(setting, memory, predict_time(model, rated, gpu, memory.keep), run.config.ds_config)
    found = as_json(plan, Question(model, gpu, run.world, setting.host_gib))
    if not has_rates:
        return {key: value for key, value in found.items() if key not in TIMES}
    packs = run.config.train.gradient_accumulation_steps
    return found | {"step_s": round(packs * plan.time.total_s, 3), "packs_a_step": packs * setting.dp}


def as_json(plan: Plan, question: Question) -> dict[str, Any]:
    """A plan for machines; sizes in GiB, times in seconds."""
    x = plan.setting
    return {
        "tokens": x.tokens,
        "max_length_tokens": question.length(x),
        "sp": x.sp,
        "dp": x.dp,
        "ds_config": plan.ds_config,
        "recompute": x.recompute,
        **({"recompute_every": x.every} if x.recompute == "every_k" else {}),
        "offload_host_gib": x.host_gib,
        "base": x.base,
        **({"quantize": x.quantize} if x.quantize else {}),
        "mlp_tile_tokens": x.tile_tokens,
        "kv_heads_at_a_time": x.kv_heads,
        **({"passes": x.passes, "reference": x.reference} if x.pairs else {}),
        "peak_gib": round(plan.memory.peak_gib, 2),
        "peak_at": plan.memory.moment,
        "host_gib_per_rank": round(plan.memory.host / GIB, 2),
        **({"disk_gib_per_rank": round(plan.memory.disk / GIB, 2)} if x.disk_gib else {}),
        "memory_gib": {k: round(v, 2) for k, v in memory_parts(plan, question).items()},
        "step_s": round(plan.time.total_s, 3),
        "step_parts_s": {k: round(v, 3) for k, v in plan.time.parts.items()},
        "tokens_per_s": round(plan.time.tokens_per_s, 1),
        "rates": question.gpu.source,
    }


def memory_parts(plan: Plan, question: Question) -> dict[str, float]:
    """GiB of the GPU by what they are, from the largest; what is outside torch and what is free at the end."""
    parts = {k: v / GIB for k, v in sorted(plan.memory.parts.items(), key=lambda item: -item[1]) if v > 0}
    parts[OUTSIDE] = plan.memory.outside / GIB
    parts[FREE] = question.gpu.memory_gib - sum(parts.values())
    return parts


def gpu_of_run(device_name: str, total_gib: float, memory_gib: float) -> tuple[Gpu, bool]:
    """The GPU with what a run may use of its memory, and whether its type is known; else it has an H200's rates.

    `device_name`: as torch calls it. `total_gib`: of the GPU, `memory_gib`: of that, for this run.
    """
    known = gpu_type(device_name, total_gib)
    return replace(known or Gpu.load("h200"), memory_gib=memory_gib), known is not None


def gpu_type(device_name: str, memory_gib: float) -> Gpu | None:
    """The shipped type of a GPU as torch calls it, e.g. "NVIDIA A100-SXM4-80GB"; None where there is none like it."""
    for name in shipped_gpus():
        gpu = Gpu.load(name)
        same_memory = abs(memory_gib - gpu.memory_gib) <= SAME_MEMORY * gpu.memory_gib
        words = device_name.upper().replace(" ", "")
        if same_memory and chip(name) in words and "PCIE" not in words:
            return gpu
    return None


def chip(name: str) -> str:
    """a100-80 -> A100, rtx4090 -> 4090."""
    return name.partition("-")[0].upper().removeprefix("RTX")
