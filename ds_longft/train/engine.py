"""Model, adapters, recomputation and optimizer put together, and handed to DeepSpeed.

The order matters and is the same for every run: load (ZeRO-3 partitions at load) -> RoPE check -> LoRA -> output head
-> recomputation (innermost forward first) -> optimizer -> engine, which gets no mpu (`config/ds_json.py` says why).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from ds_longft.config.run_config import RunConfig
from ds_longft.decide.decisions import Decisions, Run
from ds_longft.layout import ParallelLayout
from ds_longft.model.dropout import random_rates, switch_off
from ds_longft.model.load import load_model, trained_rows
from ds_longft.model.lora import add_lora
from ds_longft.model.packed import leave_out_of_checkpoints
from ds_longft.model.rope import check_rope
from ds_longft.model.supported import decoder_layers
from ds_longft.objectives.dpo import DpoObjective
from ds_longft.objectives.objective import Needs, Objective
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import register
from ds_longft.sequence.experts import Experts
from ds_longft.sequence.frozen import FrozenLayers
from ds_longft.sequence.linear import LinearGroup, unhook
from ds_longft.train.frozen_base import load_frozen
from ds_longft.train.install import Recompute, decided, fuse_and_tile, fused_kernels
from ds_longft.train.make_optimizer import forget_steps, inner, make_optimizer, param_groups
from ds_longft.train.model_check import check_zero_section


@dataclass
class Built:
    """What the trainer works with."""

    engine: deepspeed.DeepSpeedEngine
    model: nn.Module  # the PeftModel, or the plain model in full fine-tuning
    run: Run
    recompute: Recompute
    frozen: FrozenLayers | None = None  # layers' weights that lie in a home of their own

    @property
    def objective(self) -> Objective:
        """What the engine wraps."""
        objective: Objective = self.engine.module
        return objective


def build(
    run: Run,
    layout: ParallelLayout,
    device: torch.device,
    *,
    prepare: Callable[[nn.Module], None] | None = None,
    loaded: Callable[[], None] | None = None,
    decisions: Decisions | None = None,
) -> Built:
    """Load the model and wrap it in a DeepSpeed engine.

    Every rank draws the same adapter initialisation. `decisions`: how it saves memory; left out, what is decided here.
    `prepare` is called with the model, adapters in place, before the optimizer copies its weights; `loaded` is called
    once the model is built.
    """
    config, engine_config, hf_config, stage = run.config, run.engine_config, run.hf_config, run.stage
    check_zero_section(engine_config)
    register()
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # it is written first
    decisions = decisions or decided(run, device)
    base, frozen = _load(run, device)
    leave_out_of_checkpoints(base)
    model: nn.Module = base
    check_rope(base, hf_config)
    fused_kernels(base, config, device)
    if config.lora is not None:
        rows = trained_rows(config.model)
        model = add_lora(base, config.lora, seed=config.seed, revision=config.model.revision, train_rows=rows)
    if loaded is not None:
        loaded()
    if prepare is not None:
        prepare(model)
    reference: nn.Module | None = None
    fused: list[LinearGroup | Experts] = []
    if Needs.of(config).reference == "model":
        reference, fused = frozen_reference(run, decisions, device)
    objective = make_objective(config, model, layout, decisions, reference)
    recompute = Recompute.install(base, run, decisions, device, frozen)
    model.train()
    optimizer = None
    if "optimizer" not in engine_config:
        offloaded = "offload_optimizer" in engine_config.get("zero_optimization", {})
        optimizer = make_optimizer(model, config.optim, fused=device.type == "cuda", offloaded=offloaded)
    with frozen.hidden() if frozen is not None else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            model_parameters=None if optimizer is not None else param_groups(model, config.optim.weight_decay),
            config={"zero_allow_untested_optimizer": True, **engine_config},
        )
    if stage == 0:  # its bf16 wrapper has taken a step of zeros: Adam's corrections would count it
        forget_steps(inner(engine))
    if stage == 3:
        groups = [group for layer in recompute.groups for group in layer]
        for held in [*fused, *recompute.experts, *recompute.uneven, *groups]:
            held.unhook()
        unhook(m for m in engine.module.modules() if next(m.parameters(), None) is None)  # activations, in tiles
    seed_dropout(config.seed, layout.rank)
    check_rope(base, hf_config)  # again: casting the module's buffers to bf16 would round the frequencies
    return Built(engine, model, run, recompute, frozen)


def make_objective(
    config: RunConfig,
    model: nn.Module,
    layout: ParallelLayout,
    decisions: Decisions,
    reference_model: nn.Module | None = None,
) -> Objective:
    """What the run trains for: the one place where an objective is chosen."""
    kernel, heads = config.model.kernel, decisions.setting.kv_heads
    if config.objective == "sft":
        factors = config.train.router_aux_loss, config.train.router_z_loss
        return SftObjective(model, layout, kernel, heads, factors)
    switch_off(random_rates(model))  # dropout would blur the reference, and two passes would draw two masks
    dpo = config.dpo.model_copy(update={"passes": decisions.setting.passes})
    return DpoObjective(model, layout, dpo, kernel, reference_model=reference_model, kv_heads_at_a_time=heads)


def _load(run: Run, device: torch.device) -> tuple[PreTrainedModel, FrozenLayers | None]:
    """The model, and its layers' frozen weights where they lie in a home of their own."""
    dtype = torch.bfloat16 if run.engine_config.get("bf16", {}).get("enabled") else torch.float32
    if run.base in ("sharded", "host"):
        return load_frozen(run, dtype, device)
    model, seed = run.config.model, run.config.seed
    of_engine = run.engine_config
    return load_model(model, run.hf_config, ds_engine_config=of_engine, dtype=dtype, device=device, seed=seed), None


def frozen_reference(
    run: Run, decisions: Decisions, device: torch.device
) -> tuple[PreTrainedModel, list[LinearGroup | Experts]]:
    """The model as it is before training, a second time: partitioned under ZeRO-3, never trained and never saved.

    Also what was put onto it where its MLPs run in tiles: its forward pass would have the highest peak otherwise.
    """
    hf_config = copy.deepcopy(run.hf_config)
    model, _ = _load(replace(run, hf_config=hf_config), device)
    check_rope(model, hf_config)
    fused_kernels(model, run.config, device)
    model.requires_grad_(False)
    switch_off(random_rates(model))
    held: list[LinearGroup | Experts] = []
    if decisions.setting.tile_tokens:
        for layer in decoder_layers(model):
            fused = fuse_and_tile(layer, run.stage, decisions.setting.tile_tokens)
            held += [*fused.groups, *fused.experts]
    return model, held


def seed_dropout(seed: int, rank: int) -> None:
    """Start this rank's random numbers: another stream on each rank, so that no two shards drop the same features."""
    torch.manual_seed(seed * 1_000_003 + 7919 * rank + 1)  # seeds the GPU's generator as well
