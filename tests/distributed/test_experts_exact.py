"""Grouped experts in float64 on two ranks: loss and every gradient of plain transformers (and plain PEFT) on each
document alone, all weights and adapters on the experts.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_exact import LATENT, PACKS, SINKS, assert_equal, wide_gradients, wide_reference

LORA = {"experts": True}
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "sliding_window": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT_EXPERTS = {**LATENT, **EXPERTS, "n_shared_experts": 1}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
ERNIE = {**EXPERTS, "moe_num_experts": 4, "moe_num_shared_experts": 1, "moe_k": 2, "moe_layer_start_index": 1}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    # what is special: family, config changes, ways to save memory, policy
    "Mixtral": ("mixtral", EXPERTS, {"x": 0}, "keep_attention"),
    "Mixtral, tiles": ("mixtral", EXPERTS, {"tile": 7}, "full"),
    "shared expert with a gate": ("qwen2_moe", SHARED, {"tile": 7}, "keep_attention"),
    "weights normalised": ("qwen3_moe", EXPERTS, {"x": 0}, "none"),
    "transposed weights, biases, sinks": ("gpt_oss", SINKS, {"tile": 5}, "keep_attention"),
    "a dense layer first": ("glm4_moe", {**EXPERTS, "n_shared_experts": 1}, {"x": 0}, "full"),
    "latent attention": ("deepseek_v3", LATENT_EXPERTS, {"x": 0}, "keep_attention"),
    "OLMoE": ("olmoe", EXPERTS, {"x": 0}, "auto"),
    "sparse mixer": ("phimoe", {**EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}, {"x": 0}, "full"),
    "residuals scaled": ("granitemoe", {**EXPERTS, "residual_multiplier": 0.5}, {"x": 0}, "keep_attention"),
    "router in float32": ("ernie4_5_moe", ERNIE, {"x": 0}, "keep_attention"),
    "documents whole on their ranks": ("qwen3_moe", EXPERTS, {"whole": True, "tile": 7}, "keep_attention"),
    "in segments": ("qwen3_moe", {**EXPERTS, "num_hidden_layers": 4}, {"x": 0}, "sqrt"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lora", [False, LORA], ids=["full", "lora"])
def test_gradients_equal_one_process(pools: Any, name: str, lora: Any) -> None:
    family, changes, saving, policy = CASES[name]
    ours = pools(2).run(wide_gradients, family, changes, lora, policy, False, 2, PACKS, saving)[0]
    assert_equal(ours, wide_reference(family, changes, lora, False))
