"""The proof without the engine, in float64: op, loss, model, accumulation over ranks equal one process to 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_longft.config import LoraConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import add_lora
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.recompute import apply_recompute
from ds_longft.sequence.shard import shard
from tests.distributed.models import make_pack, reference_sum, relative_error, tiny_config, tiny_model

PACKS = ([20, 1, 50, 26], [97], [3, 3, 40, 7, 9])


def prepared(model: Any, lora: bool) -> Any:
    """LoRA with B not zero, so that A has a gradient too."""
    if not lora:
        return model
    model = add_lora(model, LoraConfig(r=4), seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return model


def gradients(
    rank: int, world: int, family: str, changes: dict[str, Any], lora: bool, policy: str, sample: bool, sp: int
) -> Any:
    """Loss and every gradient of three packs of one step, on `world` ranks in groups of `sp`."""
    register()
    config = tiny_config(family, **changes)
    model = prepared(tiny_model(config, attn=ULYSSES, dtype=torch.float64), lora)
    layout = ParallelLayout.create(sp)
    objective = SftObjective(model, layout)
    base = model.get_base_model() if lora else model
    apply_recompute(list(base.get_decoder().layers), policy)
    packs = [make_pack(lengths, seed=i, multiple=sp, sample_weighting=sample) for i, lengths in enumerate(PACKS)]
    weight = sum(float(p.loss_weights.sum(dtype="float64")) for p in packs)
    total = torch.zeros((), dtype=torch.float64)
    for pack in packs[layout.dp_rank :: layout.dp]:
        loss = objective(shard(pack, layout, torch.device("cpu"))) / weight
        loss.backward()
        total += loss.detach()
    grads = {
        n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad
    }
    for tensor in (total, *grads.values()):
        dist.all_reduce(tensor)
    return (float(total), grads) if rank == 0 else None


def reference(family: str, changes: dict[str, Any], lora: bool, sample: bool) -> Any:
    """The same from one process with a dense attention, each document alone."""
    model = prepared(tiny_model(tiny_config(family, **changes), attn="dense", dtype=torch.float64), lora)
    packs = [make_pack(lengths, seed=i, sample_weighting=sample) for i, lengths in enumerate(PACKS)]
    weight = sum(float(p.loss_weights.sum(dtype="float64")) for p in packs)
    loss = sum(reference_sum(model, p) for p in packs) / weight
    loss.backward()
    return float(loss.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }


CASES = [
    # family, config changes, LoRA, recompute policy, sample weighting, world, sp
    ("llama", {}, False, "none", False, 2, 1),
    ("llama", {}, True, "keep_attention", False, 2, 2),
    ("llama", {}, False, "full", True, 4, 4),
    ("llama", {"num_hidden_layers": 5}, True, "sqrt", True, 4, 2),
    ("llama", {"num_hidden_layers": 5}, False, "every_k", False, 2, 2),
    ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}, True, "keep_attention", False, 2, 2),
    ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}, False, "none", False, 4, 4),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True}, False, "keep_attention", False, 4, 4),
    ("qwen2", {}, True, "keep_attention", False, 2, 2),
    ("qwen3", {}, False, "keep_attention", False, 4, 2),
    ("mistral", {"sliding_window": 11}, False, "keep_attention", False, 4, 4),
    ("mistral", {"sliding_window": 300}, True, "full", False, 2, 2),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}, True, "keep_attention", False, 2, 2),
    ("gemma", {}, False, "keep_attention", False, 2, 2),
    ("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 13}, True, "keep_attention", False, 4, 4),
    ("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 13}, False, "sqrt", False, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("family, changes, lora, policy, sample, world, sp", CASES)
def test_gradients_equal_one_process(pools, family, changes, lora, policy, sample, world, sp):
    loss, grads = pools(world).run(gradients, family, changes, lora, policy, sample, sp)[0]
    ref_loss, ref = reference(family, changes, lora, sample)
    assert loss == pytest.approx(ref_loss, rel=1e-10)
    assert set(ref) <= set(grads)
    errors = {name: relative_error(grads[name], ref[name]) for name in ref}
    # Gemma's norms multiply by their weight in float32 whatever the model's dtype: those weights' gradients are float32 sums.
    float32 = {name for name in errors if family.startswith("gemma") and "norm" in name}
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if e > (1e-6 if name in float32 else 1e-10)}
    assert not wrong
