"""Where the frozen weights of a run's layers lie (`model.base`)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from ds_longft.config.ds_json import DeepSpeedSettings
from ds_longft.config.run_config import RunConfig
from ds_longft.decide.decisions import Run, decide
from ds_longft.decide.memory import host_bytes, predict, stays_resident
from ds_longft.decide.setting import GIB, Base
from ds_longft.decide.tensors import bytes_of_layers
from ds_longft.model.facts import ModelFacts

HOST_SHARE = 0.8
"""Share of a node's memory that a base and what is kept there may take."""


def settle_base(
    settings: DeepSpeedSettings,
    config: RunConfig,
    facts: ModelFacts,
    memory_gib: float | None,
    saved_stage: int | None = None,
    quantize: str = "",
) -> tuple[Base, str]:
    """Where frozen weights lie, and why if `model.base` leaves it open: with adapters, weights that fit stay whole on
    each GPU, where the JSON leaves open whether ZeRO-3 releases them.

    Nothing is left for ZeRO-3 to divide where they are not the engine's: it becomes stage 2. ZeRO-3 that releases
    nothing would hold each GPU's share besides, 7.5 GiB of a Llama-8B on two GPUs, and gather all weights anew in each
    step, also those that never change: 0.2 of 6.2 s on two H200s (8 x 16,384 tokens).

    Args:
        settings: its engine config is changed in place.
        memory_gib: as from `own_memory_gib`, so that every rank decides alike; None on CPUs, where nothing is decided.
        saved_stage: of the checkpoint that the run goes on from: how full a GPU is at this start must not decide it.
        quantize: format of the weights; ZeRO-3 could divide none of those.
    """
    zero, asked = settings.engine["zero_optimization"], config.model.base
    if asked != "auto":
        if asked != "engine":
            stage_2(zero)
        return asked, ""
    if memory_gib is None or not settings.resident_if_fits or zero["stage"] != 3 or saved_stage == 3:
        return "engine", ""
    if saved_stage != 2:
        size = 2 if settings.engine["bf16"]["enabled"] else 4
        lora, offloaded = config.lora is not None, "offload_param" in zero
        of_weights = 0 if quantize else size * facts.weights
        if not stays_resident(of_weights, lora=lora, offload_params=offloaded, memory_gib=memory_gib):
            return "engine", ""
    stage_2(zero)
    return "resident", "the frozen weights fit on each GPU and stay there whole"


def stage_2(zero: dict[str, Any]) -> None:
    """Turn a JSON's ZeRO-3 into stage 2, in place: where weights are not the engine's nothing is left to divide."""
    if zero.get("stage") == 3:
        for key in [key for key in zero if key.startswith("stage3_")]:
            del zero[key]
        zero["stage"] = 2


def what_is_lost(run: Run, settings: DeepSpeedSettings) -> str:
    """A line on keys of the JSON that are ZeRO-3's where the run has another stage; "" where there are none."""
    if run.stage == 3 or not settings.of_stage_3:
        return ""
    why = f", as model.base {run.base} leaves it nothing to divide" if settings.stage == 3 else ""
    return (
        f"ds_config: ZeRO-3 alone reads zero_optimization.{', '.join(settings.of_stage_3)}, and the run is of stage "
        f"{run.stage}{why}: without effect"
    )


def with_room(run: Run, host_gib: float) -> Run:
    """The run as it is if its longest pack fits, or if it fits in no way; else with its frozen weights sharded over the
    GPUs, or on the host, whichever is faster and fits. `host_gib`: memory of a node.
    """
    if run.config.lora is None or run.facts.state_products or _fits(run):
        return run
    gpu = run.gpu
    bases: list[Base] = ["sharded", "host"] if gpu.all_gather_gb_s > gpu.host_gb_s else ["host", "sharded"]
    for base in bases:
        if base == "sharded" and run.world == 1:
            continue
        config = copy.deepcopy(run.engine_config)
        stage_2(config["zero_optimization"])
        way = replace(run, base=base, engine_config=config)
        needed_gib = run.config.train.offload_host_gib + host_bytes(run.facts, way.setting) * run.local_world / GIB
        if _fits(way) and (base != "host" or needed_gib <= HOST_SHARE * host_gib):
            gib = bytes_of_layers(run.facts, way.setting) / GIB
            where = "shared by the GPUs" if base == "sharded" else "in host memory"
            why = (
                f"a pack of {way.setting.tokens:,} tokens does not fit beside the weights; {gib:.1f} GiB of them are "
                f"{where} and come a layer ahead"
            )
            return replace(way, why=why)
    return run


def _fits(run: Run) -> bool:
    return predict(run.facts, decide(run).setting, run.gpu).fits(run.gpu)
