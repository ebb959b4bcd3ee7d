"""Tiny models of every supported family: 2 layers, hidden 64, 4 heads of 16, a window of 64 tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

WINDOW = 64
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3")
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


def tiny_config(family: str, **changes: object) -> PretrainedConfig:
    sliding = ["sliding_attention", "full_attention"]
    shape = SHAPE | changes
    match family:
        case "llama":
            return LlamaConfig(**shape)
        case "qwen2":
            return Qwen2Config(**shape)
        case "qwen3":
            return Qwen3Config(**shape)
        case "mistral":
            return MistralConfig(sliding_window=16, **shape)
        case "phi3":
            return Phi3Config(**{"original_max_position_embeddings": WINDOW, **shape})
        case "gemma":
            return GemmaConfig(**shape)
        case "gemma2":
            return Gemma2Config(sliding_window=16, **shape)
        case "gemma3":
            return Gemma3TextConfig(sliding_window=16, layer_types=sliding, **shape)
        case "phimoe":
            return AutoConfig.for_model(family, sliding_window=16, **EXPERTS | shape)
        case "qwen3_moe" | "mixtral" | "glm4_moe" | "gpt_oss" | "deepseek_v3":
            return AutoConfig.for_model(family, **EXPERTS | shape)
    raise AssertionError(family)


def save_tiny(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A saved model with random weights from a fixed seed."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder
