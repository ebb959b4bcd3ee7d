"""The DeepSpeed JSON, made whole: every "auto" filled from the run config, every contradiction listed.

The engine is told nothing of sequence parallelism: given an mpu or `sequence_parallel_size`, DeepSpeed averages
gradients over all ranks at stage 3, but over the data-parallel ranks below it. Told nothing, every stage averages over
all ranks, and one loss scale is right for all stages. So `sequence_parallel_size` is taken out here and honoured by us.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from ds_longft.config.ds_keys import ALLOWED, LOWEST, OPTIMIZER_PARAMS, REFUSED
from ds_longft.config.optimizers import engine_problems
from ds_longft.config.other_trainers import nearest
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError

Device = Literal["cuda", "cpu"]

TYPICAL_HIDDEN_SIZE = 4096  # bucket sizes of a hub model, whose config is not at hand yet
LORA_BUCKET_ELEMENTS = 5_000_000  # adapter gradients are a few MB; DeepSpeed's default of 5e8 would cost GBs of buffers
ALLGATHER_BUCKET_ELEMENTS = 50_000_000
STAGE_3_ALONE = ("stage3_", "zero_hpz_partition_size")
NEVER_PRINT = 1_000_000_000  # DeepSpeed's own line every 10 steps tells nothing that ours does not


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A merged DeepSpeed JSON."""

    engine: dict[str, Any]  # for deepspeed.initialize and HfDeepSpeedConfig; holds no "auto"
    sp: int | None  # the JSON's sequence_parallel_size, which the engine must not see
    stage: int  # ZeRO stage
    resident_if_fits: bool = False  # the JSON leaves it to us whether gathered weights stay on each GPU
    of_stage_3: tuple[str, ...] = ()  # what the JSON itself sets and ZeRO-3 alone reads


def merge_ds_config(
    raw: dict[str, Any], config: RunConfig, *, world: int, device: Device, hidden_size: int | None
) -> DeepSpeedSettings:
    """Fill the JSON from the run config. Raises ConfigError with every key that is unknown, wrong or contradicts.

    `world` counts all ranks. `hidden_size` sizes the buckets; None where the model's config is not at hand.
    """
    engine, problems = _checked(raw)
    given = (engine.pop(key, "auto") for key in ("sequence_parallel_size", "data_parallel_size"))
    sp, dp = (None if number == "auto" else number for number in given)
    zero = engine.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    problems += _stage_problems(stage, zero)
    if sp is not None and sp < 1:
        problems.append(f"sequence_parallel_size is {sp}: it counts GPUs, give 1 or more")
    elif dp is not None and (sp or 1) * dp != world:
        problems.append(
            f"data_parallel_size {dp} x sequence_parallel_size {sp or 1} is not the {world} ranks of this run: leave "
            "data_parallel_size out, it follows from the other two"
        )
    if config.train.verify_first and zero.get("round_robin_gradients") is True:
        problems.append(
            "zero_optimization.round_robin_gradients is true, and train.verify_first reads gradients, which DeepSpeed "
            "cannot with it: leave one of them out"
        )
    hpz = zero.get("zero_hpz_partition_size", 1)
    if isinstance(hpz, int) and world % hpz:
        problems.append(
            f"zero_optimization.zero_hpz_partition_size is {hpz}, which does not divide the {world} ranks: "
            f"it counts the ranks that share a second copy of the weights, in most cases those of a node"
        )
    named = "optimizer" in engine and config.optim.type not in OPTIMIZER_PARAMS
    problems += engine_problems(config.optim.type, stage, offloaded="offload_optimizer" in zero, named=named)
    if named:
        del engine["optimizer"]
    problems += _optimizer_problems(engine, config)
    _choose_optimizer_mode(engine, config, device)
    for key, (value, why) in _values_from_run(engine, config, world, device).items():
        problems += _fill_or_compare(engine, key, value, why)
    if config.model.base not in ("auto", "engine") and "offload_param" in zero:
        problems.append(
            f"zero_optimization.offload_param is set, and model.base is {config.model.base}: both say where "
            "frozen weights lie. Leave one of them out"
        )
    of_stage_3 = tuple(
        f"{key} {json.dumps(value)}" for key, value in zero.items() if key.startswith(STAGE_3_ALONE) and value != "auto"
    )
    resident_if_fits = zero.get("stage3_param_persistence_threshold") == "auto"
    _fill_sizes(zero, stage, lora=config.lora is not None, hidden=hidden_size or TYPICAL_HIDDEN_SIZE)
    problems += _sum_type_problems(engine)
    _fill_sum_types(engine, stage, lora=config.lora is not None, packs=config.train.gradient_accumulation_steps)
    engine.setdefault("steps_per_print", NEVER_PRINT)
    problems += [f'{key} is "auto", which nothing here can fill: give a value' for key in _autos(engine)]
    if problems:
        raise ConfigError([f"ds_config: {problem}" for problem in problems])
    return DeepSpeedSettings(engine, sp, stage, resident_if_fits, of_stage_3)


def _checked(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A deep copy without the keys that cannot stay, and a problem for each that is not merely switched off."""
    sections = {key.partition(".")[0] for key in ALLOWED if "." in key}
    engine: dict[str, Any] = {}
    problems = []
    for name, content in raw.items():
        if name not in sections:
            entries, place = {name: content}, engine
        elif isinstance(content, dict):
            entries, place = content, engine.setdefault(name, {})
        else:
            problems.append(f"{name} is {json.dumps(content)}, expected a section {{...}}")
            continue
        for leaf, value in entries.items():
            key = leaf if place is engine else f"{name}.{leaf}"
            if problem := _value_problem(key, value):
                problems.append(problem)
            elif key in ALLOWED:
                place[leaf] = copy.deepcopy(value)
    return engine, problems


def _value_problem(key: str, value: Any) -> str | None:
    if key in REFUSED:
        reason, harmless = REFUSED[key]
        off = value.get("enabled") in (harmless, "auto") if isinstance(value, dict) else value == harmless
        return None if off else f"{key} is {json.dumps(value)}, which is refused: {reason}"
    if key not in ALLOWED:
        known = {*ALLOWED, *(key.partition(".")[0] for key in ALLOWED)}
        return f"unknown key {key}{nearest(key, known)}"
    kinds = ALLOWED[key]
    if key in LOWEST and value != "auto":
        whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        if whole and value >= LOWEST[key]:
            return None
        return f"{key} is {json.dumps(value)}, expected a whole number of at least {LOWEST[key]}"
    if (value == "auto" and dict not in kinds) or (
        isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    ):
        return None
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a section {...}"}
    return f"{key} is {json.dumps(value)}, expected {wanted[kinds[-1]]}"


def _stage_problems(stage: Any, zero: dict[str, Any]) -> list[str]:
    """Offload sections are dropped where their device is "none"; the rest must fit the stage."""
    if stage not in (0, 1, 2, 3):
        return [f"zero_optimization.stage is {json.dumps(stage)}, expected 0, 1, 2 or 3"]
    problems = []
    ratio = zero.get("offload_optimizer", {}).get("ratio", 1.0)
    if ratio != 1.0:
        problems.append(
            f"zero_optimization.offload_optimizer.ratio is {json.dumps(ratio)}: DeepSpeed then steps a part of the "
            "weights with a second optimizer, which no schedule reaches; leave it out"
        )
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        key, target = f"zero_optimization.{name}", zero.get(name, {}).get("device", "none")
        if target not in ("none", "cpu", "nvme"):
            problems.append(f"{key}.device is {json.dumps(target)}, expected none, cpu or nvme")
        elif target == "none":
            zero.pop(name, None)
        elif stage < lowest:
            problems.append(f"{key} needs stage {lowest} or more, zero_optimization.stage is {stage}")
        elif target == "nvme" and not zero[name].get("nvme_path"):
            problems.append(f"{key}.device is nvme: give {key}.nvme_path")
    return problems


def _choose_optimizer_mode(engine: dict[str, Any], config: RunConfig, device: Device) -> None:
    """Keep DeepSpeed from compiling its C++ Adam on machines without a GPU, and from refusing SGD."""
    offloaded = "offload_optimizer" in engine["zero_optimization"]
    if offloaded and "optimizer" not in engine and (device == "cpu" or config.optim.type == "sgd"):
        engine["zero_force_ds_cpu_optimizer"] = False
    if "optimizer" in engine and device == "cpu" and config.optim.type == "adamw":
        engine["optimizer"].setdefault("params", {})["torch_adam"] = True
    if config.optim.type == "sgd":
        engine["zero_allow_untested_optimizer"] = True  # ZeRO's list of tested optimizers lacks it
    if config.optim.type == "muon" and engine["zero_optimization"]["stage"] == 3:
        engine["zero_optimization"].setdefault("reduce_scatter", False)  # DeepSpeed refuses the two together


def _values_from_run(
    engine: dict[str, Any], config: RunConfig, world: int, device: Device
) -> dict[str, tuple[Any, str]]:
    """Dotted key -> (value, where it comes from), for each key the run config decides."""
    optim, gas = config.optim, config.train.gradient_accumulation_steps
    bf16 = config.model.dtype == "bf16" or (config.model.dtype == "auto" and device == "cuda")
    why_bf16 = f"model.dtype {config.model.dtype}" + (f" on {device}" if config.model.dtype == "auto" else "")
    batch = f"{world} ranks x train.gradient_accumulation_steps; the engine counts all ranks"
    values: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (1, "a micro batch is one pack; data.pack_tokens sets its size"),
        "gradient_accumulation_steps": (gas, "train.gradient_accumulation_steps"),
        "train_batch_size": (world * gas, batch),
        "gradient_clipping": (optim.max_grad_norm or 0.0, "optim.max_grad_norm"),
        "bf16.enabled": (bf16, why_bf16),
    }
    if "optimizer" in engine:
        values["optimizer.params.lr"] = (optim.learning_rate, "optim.learning_rate")
        values["optimizer.params.weight_decay"] = (optim.weight_decay, "optim.weight_decay")
        values["optimizer.type"] = ("AdamW" if optim.type == "adamw" else "SGD", "optim.type")
        if optim.type == "adamw":
            values["optimizer.params.betas"] = (list(optim.betas), "optim.betas")
            values["optimizer.params.eps"] = (optim.eps, "optim.eps")
    return values


def _fill_or_compare(engine: dict[str, Any], key: str, value: Any, why: str) -> list[str]:
    """Put the value where the JSON leaves it open; where it does not, it has to agree."""
    *sections, leaf = key.split(".")
    place = engine
    for section in sections:
        place = place.setdefault(section, {})
    seen = place.get(leaf, "auto")
    if seen == "auto":
        place[leaf] = value
    elif not _agree(seen, value):
        given = f"the run config gives {json.dumps(value)} ({why})"
        return [f'{key} is {json.dumps(seen)}, {given}: set it to "auto", or make the two agree']
    return []


def _agree(seen: Any, value: Any) -> bool:
    if isinstance(value, list):
        return isinstance(seen, list) and len(seen) == len(value) and all(map(_agree, seen, value))
    if isinstance(value, bool) or isinstance(seen, bool):
        return seen is value
    if isinstance(value, str):
        return isinstance(seen, str) and seen.lower() == value.lower()
    return isinstance(seen, int | float) and math.isclose(seen, value, rel_tol=1e-9)


def _fill_sizes(zero: dict[str, Any], stage: int, *, lora: bool, hidden: int) -> None:
    """Bucket sizes in elements. A reduce bucket is memory held all the time, so it is set even where it is left out."""
    if zero.get("reduce_bucket_size", "auto") == "auto":
        zero["reduce_bucket_size"] = LORA_BUCKET_ELEMENTS if lora else max(LORA_BUCKET_ELEMENTS, hidden * hidden)
    sizes = {"allgather_bucket_size": ALLGATHER_BUCKET_ELEMENTS}
    if stage == 3:
        sizes["stage3_prefetch_bucket_size"] = int(0.9 * hidden * hidden)
        sizes["stage3_param_persistence_threshold"] = 10 * hidden
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == "auto"})


def _sum_type_problems(engine: dict[str, Any]) -> list[str]:
    """Sums of gradients in a type that is narrower than theirs depend on how many there are to add."""
    exact = ["fp32", "bf16"] if engine["bf16"]["enabled"] is True else ["fp32"]
    seen = {
        "communication_data_type": engine.get("communication_data_type", "auto"),
        "data_types.grad_accum_dtype": engine.get("data_types", {}).get("grad_accum_dtype", "auto"),
    }
    return [
        f"{key} is {json.dumps(value)}, expected {' or '.join(exact)}: this run's gradients are {exact[-1]}, and "
        "rounded to less before they are added, they depend on the number of ranks and packs; leave the key out"
        for key, value in seen.items()
        if value not in ("auto", *exact)
    ]


def _optimizer_problems(engine: dict[str, Any], config: RunConfig) -> list[str]:
    """Parameters that the optimizer would raise over, after the model is loaded."""
    known = OPTIMIZER_PARAMS.get(config.optim.type, ())
    return [
        f"optimizer.params.{key} is {json.dumps(value)}, which optim.type {config.optim.type} does not know"
        f"{nearest(key, known) or ': known are ' + ', '.join(known)}"
        for key, value in engine.get("optimizer", {}).get("params", {}).items()
        if key not in known
    ]


def _fill_sum_types(engine: dict[str, Any], stage: int, *, lora: bool, packs: int) -> None:
    """bf16 gradients are summed over ranks and micro-steps in float32 where that is cheap; DeepSpeed would sum in bf16.

    Adapters' gradients are a few MB. Those of all weights are summed over several packs in float32, for 2 more bytes a
    weight of a rank's share; between ranks they travel in bf16, which is half of what waits for the network. Relative
    errors on 4 ranks, 16 micro-steps: 5.9e-3 in bf16, 2.7e-3 with bf16 between the ranks alone, 4e-9 all in float32.
    Below stage 2 float32 sums would need another optimizer of DeepSpeed's.
    """
    in_bf16 = engine["bf16"]["enabled"] and stage in (2, 3)
    sums = (engine.setdefault("data_types", {}), "grad_accum_dtype", in_bf16 and (lora or packs > 1))
    for section, key, in_float32 in (sums, (engine, "communication_data_type", in_bf16 and lora)):
        if section.get(key, "auto") == "auto":
            section.pop(key, None)
            if in_float32:
                section[key] = "fp32"


def _autos(content: Any, prefix: str = "") -> list[str]:
    """Dotted keys that still hold "auto"."""
    if isinstance(content, dict):
        return [key for name, value in content.items() for key in _autos(value, f"{prefix}.{name}" if prefix else name)]
    return [prefix] if content == "auto" else []
