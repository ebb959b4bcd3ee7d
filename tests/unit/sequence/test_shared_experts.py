"""A shared expert in tiles leaves its input alone: the router reads it too."""

from __future__ import annotations

import copy

import torch
from torch.utils.checkpoint import checkpoint

from ds_longft.train.install import fuse_and_tile
from tests.distributed.models import tiny_config, tiny_model

DEEPSEEK = {
    "q_lora_rank": None, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip


def test_the_gradient_of_the_router_is_right_inside_a_checkpoint() -> None:
    """The input's gradient was written over the input, and the router's gradient made of that."""
    plain = tiny_model(tiny_config("deepseek_v2", **DEEPSEEK), attn="eager", dtype=torch.float32).model.layers[1]
    tiled = copy.deepcopy(plain)
    assert fuse_and_tile(tiled, 0, 7).tiled is not None
    hidden = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0))
    for layer in (plain, tiled):
        x = hidden.clone().requires_grad_()
        out = checkpoint(lambda h, of=layer: of.mlp(of.post_attention_layernorm(h)), x, use_reentrant=False)
        out.square().sum().backward()
    torch.testing.assert_close(tiled.mlp.gate.weight.grad, plain.mlp.gate.weight.grad, rtol=1e-4, atol=1e-5)
