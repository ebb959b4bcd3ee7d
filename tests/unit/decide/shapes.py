"""Configs of real models, by their published sizes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from ds_longft.model.facts import ModelFacts


def shape(model_type: str = "llama", **sizes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    return {"model_type": model_type, "max_position_embeddings": 1 << 22, "rope_parameters": rope, **sizes}


LLAMA_8B = shape(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
QWEN_7B = shape(
    "qwen2",
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
SMOLLM2 = shape(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
YI_9B = shape(
    vocab_size=64000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
)
LLAMA_13B = shape(
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
LLAMA_70B = shape(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)

MIXTRAL = shape(
    "mixtral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_local_experts=8,
    num_experts_per_tok=2,
    sliding_window=None,
)
QWEN_30B = shape(
    "qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)
GPT_OSS = shape(
    "gpt_oss",
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=24,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    num_local_experts=32,
    num_experts_per_tok=4,
    sliding_window=128,
)


def sizes(of: dict[str, Any], **changes: Any) -> ModelFacts:
    return ModelFacts.from_config(AutoConfig.for_model(**{**of, **changes}))
