"""Model, adapters, recomputation and optimizer put together, and handed to DeepSpeed.

The order matters and is the same for every run: load (ZeRO-3 partitions at load) -> RoPE check -> LoRA -> output head ->
recomputation (innermost forward first) -> optimizer -> engine. The engine gets no mpu: every ZeRO stage then averages
gradients over all ranks alike, and one loss scale is right for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ds_longft.config import OptimConfig, RunConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.flops import ModelShape
from ds_longft.model.load import load_config, load_model
from ds_longft.model.lora import add_lora
from ds_longft.model.rope import check_rope
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.recompute import apply_recompute


@dataclass
class Built:
    """What the trainer works with."""

    engine: deepspeed.DeepSpeedEngine
    model: nn.Module  # the PeftModel, or the plain model in full fine-tuning
    hf_config: PretrainedConfig
    shape: ModelShape  # for counting FLOPs


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters, decayed and not: biases, norms and other vectors are never decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Under ZeRO-3 a parameter is an empty shard; its full shape is ds_shape.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def make_optimizer(model: nn.Module, optim: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """torch AdamW or SGD over the trainable parameters; its learning rate is set before each step."""
    groups = param_groups(model, optim.weight_decay)
    if optim.type == "sgd":
        return torch.optim.SGD(groups, lr=optim.learning_rate)
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, fused=fused)


def build(config: RunConfig, engine_config: dict[str, Any], layout: ParallelLayout, device: torch.device) -> Built:
    """Load the model and wrap it in a DeepSpeed engine.

    `engine_config` is the merged DeepSpeed JSON without "auto". Every rank draws the same adapter initialisation.
    """
    register()
    dtype = torch.bfloat16 if engine_config.get("bf16", {}).get("enabled") else torch.float32
    hf_config = load_config(config.model, config.data.max_length_tokens, attn_implementation=ULYSSES)
    shape = ModelShape.from_config(hf_config)  # before ZeRO-3 is switched on for every model that is built
    base = load_model(
        config.model, hf_config, ds_engine_config=engine_config, dtype=dtype, device=device, seed=config.seed
    )
    model: nn.Module = base
    check_rope(base, hf_config)
    if config.lora is not None:
        model = add_lora(base, config.lora, seed=config.seed, revision=config.model.revision)
    objective = SftObjective(model, layout, config.model.kernel)
    recompute(base, config)
    model.train()
    optimizer = None
    if "optimizer" not in engine_config:
        offloaded = "offload_optimizer" in engine_config.get("zero_optimization", {})
        if offloaded and device.type == "cuda" and config.optim.type == "adamw":
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiled on first use; torch's own is 5-7x slower there

            optimizer = DeepSpeedCPUAdam(
                param_groups(model, config.optim.weight_decay),
                lr=config.optim.learning_rate,
                betas=config.optim.betas,
                eps=config.optim.eps,
            )
        else:
            optimizer = make_optimizer(model, config.optim, fused=device.type == "cuda")
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else param_groups(model, config.optim.weight_decay),
        config={"zero_allow_untested_optimizer": True, **engine_config},
    )
    check_rope(base, hf_config)  # again: casting the module's buffers to bf16 would round the frequencies
    return Built(engine, model, hf_config, shape)


def recompute(base: PreTrainedModel, config: RunConfig) -> None:
    """Put the run's recompute policy on the decoder layers."""
    apply_recompute(
        list(base.get_decoder().layers),
        config.train.recompute,
        every=config.train.recompute_every,
        dropout=config.lora is not None and config.lora.dropout > 0,
    )
