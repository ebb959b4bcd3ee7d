"""What makes a step fast without changing what it computes: fused kernels and linears, resident weights, and as little
recomputation as the memory left allows.

`auto` recomputation measures instead of guessing: one rehearsal step on the longest pack with only attention kept
shows the memory that is left; it is then spent on keeping the outputs of linears, layer by layer. The rehearsal also
finds an out-of-memory error before the first step rather than hours into a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from ds_longft.batch import Pack
from ds_longft.config import RunConfig
from ds_longft.data.pairs import pair_sides
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.model.flops import ModelShape
from ds_longft.model.supported import decoder_layers
from ds_longft.objectives.dpo import DpoObjective
from ds_longft.plan.setting import GIB, Gpu
from ds_longft.plan.step import Keep
from ds_longft.sequence.kept import LEAVING, HostStore
from ds_longft.sequence.linear import LinearGroup, fuse_linears, gather_with
from ds_longft.sequence.mlp import TiledMlp, tile_mlp
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.sequence.remade import remake_first_input
from ds_longft.train.step import backpropagate_pack

RESIDENT_SHARE = 0.35
"""Weights stay gathered under ZeRO-3 when whole copy and own shard together take no more of a GPU than this."""

SPARE_SHARE = 0.06
"""Of GPU memory, never spent on keeping: the allocator's fragments, NCCL, kernels' workspaces."""


def fused_kernels(model: PreTrainedModel, config: RunConfig, device: torch.device) -> bool:
    """Norm, rotary embedding and gated activation of liger-kernel where it is installed and knows the model.

    Before LoRA, which wraps the modules that liger looks for. It replaces functions of the model's module for the whole
    process, which is how liger works.
    """
    if device.type != "cuda" or not liger_fits(config, model.config.model_type):
        return False
    from liger_kernel.transformers import monkey_patch

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


def keep_resident(engine_config: dict[str, Any], shape: ModelShape, world: int, device: torch.device) -> bool:
    """Under ZeRO-3 with LoRA: never release gathered weights, if they fit. Changes the engine config in place."""
    if device.type != "cuda":
        return False
    weights_bytes = 2 * (shape.body_weights + 2 * shape.head_weights)
    total = torch.cuda.get_device_properties(device).total_memory
    if weights_bytes * (1 + 1 / world) > RESIDENT_SHARE * total:
        return False
    engine_config["zero_optimization"].update(
        stage3_param_persistence_threshold=int(1e12), stage3_model_persistence_threshold=int(1e12)
    )
    return True


@dataclass
class Recompute:
    """The recomputation of one model: its layers' linears, and which of them are kept."""

    policy: str  # train.recompute, or what its `auto` turned to
    host_bytes: int  # this rank's share of the host memory that may be used for linears
    groups: list[list[LinearGroup]] = field(default_factory=list)  # per layer, all of them
    keep: list[LayerKeep] = field(default_factory=list)  # per layer, read at each call
    tiled: bool = False  # MLPs have no whole outputs that could be kept

    @classmethod
    def install(
        cls,
        base: PreTrainedModel,
        config: RunConfig,
        stage: int,
        local_world: int,
        device: torch.device,
        *,
        policy: str,
        every: int,
        tile_tokens: int | None = None,
        places: Sequence[Keep] | None = None,
    ) -> Recompute:
        """Fuse the decoder layers' linears, tile their MLPs, and put the recompute policy on the layers.

        `policy`, `every`: as in the config, or what was planned where that says auto.
        `places`: where each layer's input and attention output wait, as planned; left out: on the GPU.
        Raises ModelError: tiles for a model without gate, up and down projections.
        """
        layers = decoder_layers(base)
        made = cls(policy, int(config.train.offload_host_gib * 2**30) // local_world)
        made.keep = [LayerKeep(i) for i in range(len(layers))]
        # Segments call layers outside of the gathering that a fused layer needs under ZeRO-3.
        if not (stage == 3 and policy in ("every_k", "sqrt")):
            for keep, layer in zip(made.keep, layers, strict=True):
                groups, tiled = fuse_and_tile(layer, stage, tile_tokens)
                made.groups.append(groups)
                keep.last = tiled or next((g for g in groups if g.names == ("down_proj",)), None)
                made.tiled = made.tiled or tiled is not None
        if config.train.mlp_tile_tokens and not made.tiled:
            raise ModelError(
                f"train.mlp_tile_tokens is {config.train.mlp_tile_tokens}, but the MLPs of {base.config.model_type} "
                f"(recompute {policy}, ZeRO stage {stage}) cannot be tiled, for their form or for adapters with "
                f"dropout or DoRA: leave it out"
            )
        if stage == 3:
            for layer in layers:
                gather_adapted(layer)
        if places is not None and any("host" in (p.input, p.attention) for p in places):
            made._place(places, device)
        apply_recompute(
            layers,
            policy,
            every=every,
            keep=made.keep,
        )
        return made

    def _place(self, places: Sequence[Keep], device: torch.device) -> None:
        """Layer inputs and attention outputs where the plan wants them."""
        store = HostStore(device)
        for keep, place in zip(self.keep, places, strict=True):
            keep.store = store
            keep.input_on_host = place.input == "host"
            keep.attention = "host" if place.attention == "host" else "device" if place.attention else "nowhere"
        self.host_bytes = 0  # linears would be worth less than what is there already

    def spend(self, free_bytes: int, local_tokens: int, element_bytes: int, device: torch.device) -> tuple[int, int]:
        """Keep outputs of as many linears as fit into `free_bytes` with packs of `local_tokens` per rank.

        A kept element saves the same time in every linear that reads the hidden states (2 * hidden size operations).
        q, k and v come first: they are what the host is not used for. Down projections are not kept, their output is
        not needed again. Later layers stay on the device: what earlier ones send to the host has the longest time to go
        and to come back. Two layers' share of it is on the GPU at a time. Returns the bytes spent on the device and on
        the host.
        """

        def cost(group: LinearGroup) -> int:
            ranks = sum(m.lora[0].out_features for m in group.members if m.lora)
            return (group.out_features + ranks) * local_tokens * element_bytes

        taboo = {"down_proj"} | ({"gate_proj"} if self.tiled else set())
        wanted = [(k, g) for k, groups in zip(self.keep, self.groups, strict=True) for g in groups]
        wanted = [x for x in reversed(wanted) if not taboo.intersection(x[1].names)]
        wanted.sort(key=lambda x: "q_proj" not in x[1].names)
        if self.host_bytes:
            of_a_layer = {id(k): 0 for k in self.keep}
            for keep, group in wanted:
                of_a_layer[id(keep)] += 0 if "q_proj" in group.names else cost(group)
            free_bytes -= LEAVING * max(of_a_layer.values(), default=0)
        on_device = on_host = 0
        store = HostStore(device) if self.host_bytes else None
        for keep, group in wanted:
            if on_device + cost(group) <= free_bytes:
                keep.on_device.append(group)
                on_device += cost(group)
            elif free_bytes > 0 and "q_proj" not in group.names and on_host + cost(group) <= self.host_bytes:
                keep.on_host.append(group)
                keep.store = store
                on_host += cost(group)
        return on_device, on_host


def fuse_and_tile(layer: nn.Module, stage: int, tile_tokens: int | None) -> tuple[list[LinearGroup], TiledMlp | None]:
    """Fuse a decoder layer's linears. With `tile_tokens`: tile its MLP if it has gate, up and down, and make the input
    of q, k and v again instead of keeping it.
    """
    groups = fuse_linears(layer)
    weights = [weight for group in groups for weight in group.tensors]
    tiled = None
    if tile_tokens is not None:
        for group in groups:
            if "q_proj" in group.names:
                group.remade = remake_first_input(layer)
                weights += group.remade.weights if group.remade is not None else []
        tiled = tile_mlp(layer, groups, tile_tokens)
    if stage == 3:
        gather_with(layer, weights)
    return groups, tiled


def gather_adapted(layer: nn.Module) -> None:
    """Under ZeRO-3: gather what PEFT reads without calling the module that holds it, with the module around.

    Weights adapted as parameters (stacked experts, some routers), and A and B of DoRA, which otherwise are there only
    while ZeRO-3 happens to keep them: not after a resume.
    """
    for parent in layer.modules():
        for child in parent.children():
            if isinstance(child, ParamWrapper):
                gather_with(parent, [child.get_param()])
        if isinstance(parent, PeftLinear) and parent.lora_variant:
            gather_with(parent, [m.weight for part in (parent.lora_A, parent.lora_B) for m in part.values()])


def dry_pass(engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> None:
    """Forward and backward of a pack that leave nothing behind: no gradient, as the loss is multiplied by zero, and the
    random state as it was. Dropout would otherwise draw other masks after a resume than in a run that was not stopped.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        backpropagate_pack(engine, pack, 0.0, layout, device)


def rehearse(engine: Any, recompute: Recompute, pack: Pack, layout: ParallelLayout, device: torch.device) -> str | None:
    """On GPUs: one forward and backward pass on the longest pack; with `auto`, then keep what the memory left allows.

    What does not fit is found before the first step and not hours into a run. Collective. Returns a line for the
    reader, None without GPUs.
    """
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    dry_pass(engine, pack, layout, device)
    free = torch.tensor(free_bytes(device), device=device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    peak = torch.cuda.max_memory_allocated(device)
    if recompute.policy != "auto":
        return (
            f"recomputation {recompute.policy}: longest pack ({pack.tokens:,} tokens) peaks at {peak / 2**30:.1f} GiB"
        )
    size = torch.finfo(next(engine.module.parameters()).dtype).bits // 8
    at_once = pack.tokens
    if isinstance(engine.module, DpoObjective) and engine.module.passes == "two":
        at_once = max(side.tokens for side in pair_sides(pack, layout.sp))
    on_device, on_host = recompute.spend(int(free), at_once // layout.sp, size, device)
    torch.cuda.empty_cache()
    kept = sum(len(k.on_device) + len(k.on_host) for k in recompute.keep)
    return (
        f"longest pack ({pack.tokens:,} tokens) peaks at {peak / 2**30:.1f} GiB; {on_device / 2**30:.1f} GiB more "
        f"on the GPU and {on_host / 2**30:.1f} GiB on the host keep the outputs of {kept} of "
        f"{sum(map(len, recompute.groups))} groups of linears"
    )


def choose_passes(engine: Any, wanted: str, pack: Pack, layout: ParallelLayout, device: torch.device) -> str | None:
    """`dpo.passes: auto`: the plan's choice, and where that is one pass, whether the longest pack fits so. Collective;
    a line, None if nothing was open.

    The plan (`plan.advice.choose_for_run`) has put its choice into the objective: one pass where it is predicted to fit
    and two are not faster for what they leave free. Measured in two passes, which need less: one pass holds the
    activations of both sides at once, so it takes at most twice what two passes took beyond the memory that was in use
    before. Nothing can run out of memory by trying.
    """
    objective = engine.module
    if not isinstance(objective, DpoObjective) or wanted != "auto" or device.type != "cuda":
        return None
    if objective.passes == "two":
        return "dpo.passes auto: two, as `ds-longft plan` predicts"
    objective.passes = "two"
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    dry_pass(engine, pack, layout, device)
    used = torch.cuda.max_memory_allocated(device) - before
    spare = torch.tensor(free_bytes(device) - used, device=device)
    dist.all_reduce(spare, op=dist.ReduceOp.MIN)
    torch.cuda.empty_cache()
    if int(spare) >= 0:
        objective.passes = "one"
    return (
        f"dpo.passes auto: {objective.passes}; in two passes the longest pack ({pack.tokens:,} tokens) took "
        f"{used / 2**30:.1f} GiB beyond the weights, both answers at once would leave {int(spare) / 2**30:.1f} GiB"
    )


def free_bytes(device: torch.device) -> int:
    """GPU memory that the highest peak so far left unused, less a reserve; never negative."""
    total, outside = total_and_outside_torch(device)
    return max(0, int(total * (1 - SPARE_SHARE)) - outside - torch.cuda.max_memory_allocated(device))


def total_and_outside_torch(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU, and those in use that torch knows nothing of: the context, NCCL, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total, total - free - torch.cuda.memory_reserved(device)


def own_memory_gib(device: torch.device) -> tuple[float | None, float]:
    """What this run may plan with on each GPU, and what other processes hold of one. Collective; (None, 0) on CPUs.

    The smallest of all ranks' GPUs: what is chosen by it must be the same everywhere. What is in use and not by torch
    is the run's own up to what the planner counts for context and NCCL.
    """
    if device.type != "cuda":
        return None, 0.0
    total, outside = total_and_outside_torch(device)
    rates = Gpu.load("h200")  # of any type: contexts differ little
    taken = max(0.0, outside - (rates.context_gib + rates.nccl_gib) * GIB)
    least = torch.tensor([total - taken, -taken], dtype=torch.float64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    own, others = (float(x) / GIB for x in least)
    return own, -others
