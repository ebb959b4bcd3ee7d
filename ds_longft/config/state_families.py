"""Model types with layers that carry a state along the sequence, which `sequence/state` spreads over ranks."""

from __future__ import annotations

STATE_FAMILIES = frozenset(
    (
        *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear"),
        *("nemotron_h", "granitemoehybrid", "bamba", "falcon_h1", "jamba", "lfm2", "lfm2_moe", "minimax"),
    )
)
STATE_LAYERS = frozenset(("linear_attention", "conv", "mamba", "hybrid"))
"""What their configs call such layers; `hybrid` ones have softmax attention besides."""
OTHER_LAYERS = frozenset(("moe", "mlp"))
"""Layers of theirs without any look at other tokens."""
STATE_HEADS = ("linear_num_value_heads", "linear_num_heads", "mamba_num_heads", "mamba_n_heads")
"""Keys of their configs that say over how many ranks such layers can be dealt."""
