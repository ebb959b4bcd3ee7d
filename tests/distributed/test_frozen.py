"""Frozen weights in a home of their own: losses, gradient norms and adapters are those of weights that stay on each rank, to
the bit. On CPUs they move as on GPUs, and what was taken away is poison.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import built_run, make_pack, tiny_config, tiny_model

CPU = torch.device("cpu")
PAIRS = {"objective": "dpo", "dpo": {"reference": "adapter_off"}}


def trained(
    rank: int, world: int, folder: str, base: str, sp: int, stage: int, policy: str, packs: int, keys: dict[str, Any]
) -> Any:
    """(losses, gradient norms, adapters, what the base is told by, layers brought, layers that came late)."""
    import os

    from ds_longft.train.make_optimizer import set_learning_rate
    from ds_longft.train.step import backpropagate, evaluate_pack
    from ds_longft.train.weights import start_fingerprint
    from tests.distributed.dpo_cases import pair_pack

    keys = {**keys}
    keys["model"] = {"path": folder, "base": base, **keys.pop("model", {})}
    keys["optim"] = {"learning_rate": 0.01}
    keys["train"] = {"recompute": policy, "gradient_accumulation_steps": packs, **keys.pop("train", {})}
    os.environ["LOCAL_WORLD_SIZE"] = str(world)
    try:
        zero = {"stage": stage, "reduce_bucket_size": 4000}
        built, layout = built_run(folder, {"zero_optimization": zero}, world, sp=sp, **keys)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    named = start_fingerprint(built.model)
    losses, norms = [], []

    def pack(i: int, seed: int) -> Any:
        if "objective" in keys:
            return pair_pack([(20 + i, 5, 9), (3, 30, 1)], seed=seed, multiple=sp)
        return make_pack([20, 1, 50 + 5 * i, 26], seed=seed, multiple=sp)

    for step in range(3):
        mine = [pack(i, 100 * step + 10 * i + layout.dp_rank) for i in range(packs)]
        losses.append(float(backpropagate(built.engine, mine, 90.0, layout, CPU)))
        set_learning_rate(built.engine, 0.01)
        built.engine.step()
        norms.append(built.engine.get_global_grad_norm() if stage else 0.0)
        losses.append(float(evaluate_pack(built.engine, mine[0], layout, CPU)[0][0]))
    adapters = {n: p.detach().clone() for n, p in built.model.named_parameters() if p.requires_grad}
    built.engine.destroy()
    frozen = built.frozen
    assert (frozen is not None) == (base in ("host", "sharded"))
    return losses, norms, adapters, named, frozen and frozen.fetches, frozen and frozen.late


def saved(folder: Path, model_type: str = "llama", **changes: Any) -> str:
    """A model of five layers on disk: more than two slots hold, and an odd number."""
    config = tiny_config(model_type, **{"num_hidden_layers": 5, "max_position_embeddings": 4096, **changes})
    model: Any = tiny_model(config, attn="eager", dtype=torch.float32, std=0.05)
    model.save_pretrained(folder)
    return str(folder)


MXFP4 = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 6, "num_local_experts": 4,
    "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
    "sliding_window": 9, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
LORA = {"lora": {"r": 4, "alpha": 4}}
MADE = {"model": {"random_weights": True}}
"""Not read from a file: there tensors lie at any address, and MKL rounds by it (1e-10 of an adapter, tiles of 16)."""
CASES = {
    # base, sp, stage, recompute, packs a step, keys
    "host sp2 zero2 auto": ("host", 2, 2, "auto", 1, LORA),
    "sharded sp2 zero3 auto": ("sharded", 2, 3, "auto", 2, LORA),
    "host dp2 zero3 sqrt": ("host", 1, 3, "sqrt", 2, LORA),
    "sharded dp2 zero0 every_k": ("sharded", 1, 0, "every_k", 2, LORA),
    "host sp2 zero0 full in tiles": ("host", 2, 0, "full", 1, {**LORA, **MADE, "train": {"mlp_tile_tokens": 16}}),
    "host sp2 pairs": ("host", 2, 2, "keep_attention", 1, {**LORA, **PAIRS}),
    "sharded sp2 pairs in two passes": (
        "sharded", 2, 2, "full", 1, {**LORA, **PAIRS, "dpo": {"reference": "adapter_off", "passes": "two"}},
    ),
    "host nf4 zero2": ("host", 2, 2, "auto", 1, {**LORA, "model": {"quantize": "nf4"}}),
    "sharded int8 zero3 pairs": (
        "sharded", 2, 3, "full", 1, {**LORA, **PAIRS, "model": {"quantize": "int8", "random_weights": True}},
    ),
    "sharded fp8 dp2 zero1": ("sharded", 1, 1, "auto", 1, {**LORA, "model": {"quantize": "fp8"}}),
    "host mxfp4 sp2 zero1": ("host", 2, 1, "full", 1, {**LORA, "model": {"quantize": "mxfp4", **MADE["model"]}}),
    "host trained norms and head, dropout": (
        "host", 2, 2, "full", 1,
        {"lora": {"r": 4, "dropout": 0.2, "modules_to_save": ["input_layernorm", "lm_head"]}},
    ),
}  # fmt: skip


MORE = {
    "sharded mxfp4 zero2": ("sharded", 2, 2, "full", 1, {**LORA, "model": {"quantize": "mxfp4", **MADE["model"]}}),
    "host int8 dp2 zero0": ("host", 1, 0, "auto", 1, {**LORA, "model": {"quantize": "int8"}}),
    "host fp8 zero3 sqrt": ("host", 2, 3, "sqrt", 1, {**LORA, "model": {"quantize": "fp8"}}),
    "sharded nf4 zero1": ("sharded", 2, 1, "full", 1, {**LORA, "model": {"quantize": "nf4"}}),
    "host int8 zero1 pairs": ("host", 2, 1, "full", 1, {**LORA, **PAIRS, "model": {"quantize": "int8"}}),
}
"""The rest of each pair of store, format, sp and stage (`test_quantized_exact`), beside `make test`."""


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_same_to_the_bit(pools: Any, tmp_path: Path, name: str) -> None:
    base, sp, stage, policy, packs, keys = {**CASES, **MORE}[name]
    keys = {**keys, "model": {"random_weights": False, **keys.get("model", {})}}
    stored = keys["model"].get("quantize") == "mxfp4"  # of files alone
    if stored:
        del keys["model"]["quantize"]
    case = (sp, stage, policy, packs, keys)
    folder = saved(tmp_path, "gpt_oss", **MXFP4) if stored else saved(tmp_path)
    there = pools(2).run(trained, folder, "resident", *case)
    away = pools(2).run(trained, folder, base, *case)
    for ours, theirs in zip(away, there, strict=True):
        assert ours[0] == theirs[0]
        assert ours[1] == theirs[1]
        assert ours[3] == theirs[3]
        assert ours[2].keys() == theirs[2].keys()
        assert all(torch.equal(ours[2][n], theirs[2][n]) for n in ours[2])
        assert all(torch.isfinite(torch.tensor(ours[0])))
        fetches, late = ours[4:]
        assert fetches > 5 * 3  # they moved, in each step
        assert late <= 0.2 * fetches, f"{late} of {fetches} layers were not on their way when they were called"
