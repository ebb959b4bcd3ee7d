"""Puts onto a model what makes its step fast without changing what it computes: fused kernels, fused linears, grouped
experts, MLP tiles and the recomputation policy.

`auto` recomputation measures instead of guessing: a rehearsal (`rehearse.py`) with only attention kept shows the memory
that is left; `Recompute.keep_linears` then keeps the outputs of linears with it, layer by layer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ds_longft.config.ds_json import DeepSpeedSettings
from ds_longft.config.run_config import RunConfig
from ds_longft.decide.decisions import Decisions, Run, decide
from ds_longft.decide.plan_json import gpu_of_run
from ds_longft.decide.setting import GIB
from ds_longft.decide.tensors import AWAY, Keep
from ds_longft.decide.what_is_kept import spend
from ds_longft.decide.where_base_lies import settle_base, stage_2, with_room
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load import load_config
from ds_longft.model.load_packed import base_format
from ds_longft.model.supported import decoder_layers
from ds_longft.model.wrapped import is_wrapped
from ds_longft.ranks.node_memory import node_memory_gib
from ds_longft.sequence.attention import ULYSSES
from ds_longft.sequence.disk import DiskStore
from ds_longft.sequence.experts import Experts, group_experts
from ds_longft.sequence.frozen import FrozenLayers
from ds_longft.sequence.kept import HostStore
from ds_longft.sequence.linear import LinearGroup, fuse_linears, gather_with
from ds_longft.sequence.mlp import TiledMlp, tile_mlp
from ds_longft.sequence.recompute import Holder, LayerKeep, Place, apply_recompute
from ds_longft.sequence.recomputed_input import recompute_first_input
from ds_longft.sequence.relief import Relief
from ds_longft.sequence.state.families import gather_state_layers
from ds_longft.sequence.uneven import UnevenExperts, reach_experts

LIGER_OPS_BY_GRADIENT = ("ROPE", "LAYER_NORM")
"""Operations for which liger 0.8.5 takes another kernel where no gradient is wanted, and for other shapes.

The two round differently, so the reference of preference pairs would not be the policy that training starts from: a
pair of 2 x 131,072 tokens (Llama-8B shapes, random weights, two H200s) began with a loss of 7.6 instead of ln 2. One
kernel for all of them; by liger's own figures the other is as fast on Hopper.
"""


def fused_kernels(model: PreTrainedModel, config: RunConfig, device: torch.device) -> bool:
    """Norm, rotary embedding and gated activation of liger-kernel where it is installed and knows the model.

    Before LoRA, which wraps the modules that liger looks for. It replaces functions of the model's module for the whole
    process, which is how liger works.
    """
    if device.type != "cuda" or not liger_fits(config, model.config.get_text_config().model_type):
        return False
    if is_wrapped(model.config):  # liger would look for the towers
        model = model.get_decoder()
    from liger_kernel.transformers import monkey_patch

    for op in LIGER_OPS_BY_GRADIENT:
        os.environ.setdefault(f"LIGER_KERNEL_IMPL_{op}", "nvidia-triton")
    # The loss stays ours: it is over labelled rows, weighted, and a sum.
    monkey_patch._apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def liger_fits(config: RunConfig, model_type: str) -> bool:
    """Whether liger-kernel is wanted, installed, and knows the model."""
    if config.model.liger == "off":
        return False
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        return False
    return model_type in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN


def known_run(
    config: RunConfig,
    settings: DeepSpeedSettings,
    layout: ParallelLayout,
    device: torch.device,
    *,
    hf_config: PretrainedConfig | None = None,
    facts: ModelFacts | None = None,
    memory_gib: float | None = None,
    saved_stage: int | None = None,
    kernel: str = "",
    disk_gb_s: float = 0.0,
) -> Run:
    """The run as the planner is told of it, its ZeRO stage settled (`settle_base`).

    Args:
        settings: their engine config becomes the run's.
        hf_config, facts: of the model; left out, they are read.
        memory_gib: of each GPU, as from `own_memory_gib`; left out, all of it.
        saved_stage: see `settle_base`.
        kernel: of its attention.
        disk_gb_s: of `train.offload_disk`, as measured.
    """
    unset_hf_deepspeed_config()  # of an earlier ZeRO-3 model of this process: the next one would be built as it was
    if hf_config is None:
        hf_config = load_config(config.model, config.data.max_length_tokens, attn_implementation=ULYSSES)
    facts = facts or ModelFacts.from_config(hf_config)
    of_gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    name, total_gib = (of_gpu.name, of_gpu.total_memory / GIB) if of_gpu else ("", 0.0)
    gpu, has_rates = gpu_of_run(name, total_gib, memory_gib or total_gib)
    open_to_us = settings.resident_if_fits and config.model.base == "auto" and saved_stage != 3
    form = base_format(hf_config, config.model)
    base, why = settle_base(settings, config, facts, memory_gib, saved_stage, form.name if form else "")
    run = Run(
        config=config, engine_config=settings.engine, hf_config=hf_config, facts=facts, sp=layout.sp,
        world=layout.world, local_world=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), gpu=gpu, has_rates=has_rates,
        kernel=kernel, disk_gb_s=disk_gb_s, fused=liger_fits(config, facts.model_type), base=base, why=why,
    )  # fmt: skip
    if not open_to_us or memory_gib is None or "offload_param" in settings.engine["zero_optimization"]:
        return run
    found = with_room(run, node_memory_gib())
    if found.base != run.base:
        stage_2(settings.engine["zero_optimization"])
    return replace(found, engine_config=settings.engine)


def decided(run: Run, device: torch.device) -> Decisions:
    """How the run saves memory: as the planner decides; on a CPU as configured."""
    return decide(run) if device.type == "cuda" else Decisions.as_configured(run)


@dataclass
class Recompute:
    """The recomputation of one model: its layers' linears, and which of them are kept."""

    policy: str  # train.recompute, or what its `auto` turned to
    host_bytes: int  # this rank's share of the host memory that may be used for linears
    groups: list[list[LinearGroup]] = field(default_factory=list)  # per layer, all of them
    experts: list[Experts] = field(default_factory=list)  # of all layers
    uneven: list[UnevenExperts] = field(default_factory=list)  # those that keep their own forward
    keep: list[LayerKeep] = field(default_factory=list)  # per layer, read at each call
    tiled: bool = False  # MLPs have no whole outputs that could be kept

    @classmethod
    def install(
        cls,
        base: PreTrainedModel,
        run: Run,
        decisions: Decisions,
        device: torch.device,
        frozen: FrozenLayers | None = None,
    ) -> Recompute:
        """Fuse the decoder layers' linears, tile their MLPs, and put the recompute policy on the layers.

        Raises ModelError: tiles for a model without up and down projections.
        """
        config, stage = run.config, run.stage
        layers = decoder_layers(base)
        policy, places, setting = decisions.setting.recompute, decisions.keep, decisions.setting
        made = cls(policy, int(config.train.offload_host_gib * 2**30) // run.local_world)
        made.keep = [LayerKeep(i) for i in range(len(layers))]
        # Segments call layers outside of the gathering that a fused layer needs under ZeRO-3.
        if not (stage == 3 and policy in ("every_k", "sqrt")):
            for keep, layer in zip(made.keep, layers, strict=True):
                fused = fuse_and_tile(layer, stage, setting.tile_tokens)
                made.groups.append(fused.groups)
                made.experts += fused.experts
                made.uneven += fused.uneven
                keep.last = fused.last
                made.tiled = made.tiled or fused.tiled is not None
        else:
            made.uneven = [each for layer in layers for each in reach_experts(layer, (), stage)]
        if config.train.mlp_tile_tokens and not (made.tiled or made.experts):
            raise ModelError(
                f"train.mlp_tile_tokens is {config.train.mlp_tile_tokens}, but the MLPs of {base.config.model_type} "
                f"(recompute {policy}, ZeRO stage {stage}) cannot be tiled, for their form or for adapters with "
                f"dropout or DoRA: leave it out"
            )
        check_packed_experts(layers, made.experts)
        if stage == 3:
            for layer in layers:
                gather_adapted(layer, made.experts)
            gather_state_layers(base)
        if places is not None and any(place in AWAY for p in places for place in (p.input, p.attention)):
            made._place(places, device, config.train.offload_disk)
        if frozen is not None:
            frozen.install(layers)
        apply_recompute(layers, policy, every=setting.every, keep=made.keep)
        return made

    def _place(self, places: Sequence[Keep], device: torch.device, folder: str | None) -> None:
        """Layer inputs and attention outputs where the plan wants them."""
        store = HostStore(device, DiskStore(folder, device) if folder else None)
        for keep, place in zip(self.keep, places, strict=True):
            keep.store = store
            keep.input, keep.attention = cast(Place, place.input), cast(Place, place.attention or "nowhere")
        self.host_bytes = 0  # linears would be worth less than what is there already

    def relief(self, device: torch.device) -> Relief | None:
        """What gives back when the GPU is full; None where nothing could be given."""
        if not self.host_bytes and not any(keep.on_device for keep in self.keep):
            return None
        return Relief(self.keep, self.host_bytes, device)

    def keep_linears(
        self, free_bytes: int, local_tokens: int, element_bytes: int, device: torch.device
    ) -> tuple[int, int]:
        """Keep outputs of as many linears as fit into `free_bytes` with packs of `local_tokens` per rank.

        Which ones: `decide.what_is_kept.spend`. Down projections are not kept, their output is not needed again.
        Returns the bytes spent on the device and on the host.
        """
        left_out = {"down_proj"} | ({"gate_proj", "up_proj"} if self.tiled else set())

        def cost(group: LinearGroup) -> int:
            ranks = sum(m.lora[0].out_features for m in group.members if m.lora)
            return (group.out_features + ranks) * local_tokens * element_bytes

        wanted = [[g for g in groups if not left_out.intersection(g.names)] for groups in self.groups]
        costs = [{g.names: float(cost(g)) for g in groups} for groups in wanted]
        places, on_device, on_host = spend(costs, free_bytes, self.host_bytes)
        self.host_bytes -= int(on_host)
        store = HostStore(device) if on_host else None
        for keep, groups, place in zip(self.keep, wanted, places, strict=False):
            keep.on_device += [g for g in groups if place.get(g.names) == "device"]
            keep.on_host += [g for g in groups if place.get(g.names) == "host"]
            keep.store = keep.store or store
        return int(on_device), int(on_host)


@dataclass
class Fused:
    """What was put onto one decoder layer."""

    groups: list[LinearGroup]
    tiled: TiledMlp | None
    experts: list[Experts]
    uneven: list[UnevenExperts]

    @property
    def last(self) -> Holder | None:
        """What the layer ends with, as far as is known."""
        down = next((g for g in reversed(self.groups) if g.names == ("down_proj",)), None)
        return self.experts[-1] if self.experts else self.tiled or down


def fuse_and_tile(layer: nn.Module, stage: int, tile_tokens: int | None) -> Fused:
    """Fuse a decoder layer's linears and group its experts. With `tile_tokens`: tile its MLP if it has (gate,) up
    and down, and make the input of q, k and v again instead of keeping it.
    """
    groups, experts = fuse_linears(layer), group_experts(layer, tile_tokens)
    weights = [weight for group in groups for weight in group.tensors]
    weights += [weight for each in experts for weight in each.tensors]
    tiled = None
    if tile_tokens is not None:
        for group in groups:
            if "q_proj" in group.names:
                group.recomputed_input = recompute_first_input(layer)
                weights += group.recomputed_input.weights if group.recomputed_input is not None else []
        tiled = tile_mlp(layer, groups, tile_tokens)
    if stage == 3:
        gather_with(layer, weights)
    return Fused(groups, tiled, experts, reach_experts(layer, experts, stage))


def check_packed_experts(layers: Sequence[nn.Module], grouped: Sequence[Experts]) -> None:
    """Raises ModelError: PEFT's own forward of adapters on stacked experts cannot read quantised ones."""
    ours = {id(module) for experts in grouped for module in experts.outer.modules()}
    for layer in layers:
        for module in layer.modules():
            if not isinstance(module, ParamWrapper) or module.num_experts == 1 or id(module) in ours:
                continue
            if is_parametrized(module.get_base_layer()):
                raise ModelError(
                    f"lora.experts is true and the base is quantised, but the experts of this model "
                    f"({type(module.get_base_layer()).__name__}) cannot run as grouped products here: leave "
                    f"lora.experts out, or set model.quantize: none"
                )


def gather_adapted(layer: nn.Module, grouped: Sequence[Experts] = ()) -> None:
    """Under ZeRO-3: gather what PEFT reads without calling the module that holds it, with the module around.

    Weights adapted as parameters (stacked experts that are not `grouped`), and A and B of DoRA, which otherwise are
    there only while ZeRO-3 happens to keep them: not after a resume.
    """
    ours = {id(module) for experts in grouped for module in experts.outer.modules()}
    for parent in layer.modules():
        for child in parent.children():
            if isinstance(child, ParamWrapper) and id(child) not in ours:
                gather_with(parent, [child.get_param()])
        if isinstance(parent, PeftLinear) and parent.lora_variant:
            gather_with(parent, [m.weight for part in (parent.lora_A, parent.lora_B) for m in part.values()])
