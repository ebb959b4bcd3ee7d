"""The proof through the DeepSpeed engine, in float32 with SGD and no clipping: every ZeRO stage gives the gradients of
one process to 1e-6, whatever sp, dp and accumulation are. Adam or clipping would hide a wrong scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ds_longft.batch import IGNORE_INDEX, Pack
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.kept import HostStore
from ds_longft.sequence.linear import fuse_linears, gather_with, unhook
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.sequence.shard import shard
from ds_longft.sequence.state.families import gather_state_layers
from ds_longft.train.install import fuse_and_tile
from tests.distributed.models import dealt, make_pack, reference_sum, relative_error, tiny_config, tiny_model
from tests.distributed.test_exact import prepared

LENGTHS = ([20, 1, 50, 26], [97], [3, 3, 40, 7, 9], [33, 30], [11, 60], [64])
# One process in float32 is itself away from float64: with weights of this scale up to 5e-7, on CPUs with AVX-512 and
# without. Larger ones round more, and so does LoRA's default alpha / r of 8 (7e-7 to 9e-7).
STD = 0.05
LORA = {"alpha": 4}
HEADS_9_3 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TIED = {"tie_word_embeddings": True}


def with_experts(lora: Any, changes: dict[str, Any]) -> Any:
    """The adapters' settings, with more of them where `lora` is a dict."""
    more = lora if isinstance(lora, dict) else {}
    return lora and LORA | more | ({"experts": True} if changes.get("num_experts", 0) > 1 else {})


def packs_of_step(accumulation: int, dp: int, multiple: int, sample: bool, only_first_half: bool) -> list[Pack]:
    """accumulation * dp packs; the last one is a filler without targets when there are more than one."""
    count = accumulation * dp
    packs = [make_pack(LENGTHS[i], seed=i, multiple=multiple, sample_weighting=sample) for i in range(count)]
    if count > 1:
        packs[-1] = without_targets(packs[-1], 0)
    if only_first_half:  # the second sp rank has nothing to train
        packs = [without_targets(p, p.tokens // 2) for p in packs]
    return packs


def without_targets(pack: Pack, start: int) -> Pack:
    """The pack with no target from token `start` on."""
    keep = np.arange(pack.tokens) < start
    return Pack(
        pack.input_ids, pack.position_ids, np.where(keep, pack.labels, IGNORE_INDEX), pack.loss_weights * keep,
        pack.cu_seqlens, pack.padding_tokens,
    )  # fmt: skip


def one_step(
    rank: int, world: int, sp: int, stage: int, accumulation: int, lora: Any, policy: str, changes: dict[str, Any],
    sample: bool, only_first_half: bool, whole: bool = False,
) -> Any:  # fmt: skip
    """Loss, gradient norm and every gradient of one optimizer step through the engine.

    `whole`: documents lie whole on the ranks, in packs that have enough of them.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    register()
    model = prepared(
        tiny_model(tiny_config(**{"model_type": "llama", **changes}), attn=ULYSSES, dtype=torch.float32, std=STD),
        with_experts(lora, changes),
    )
    layout = ParallelLayout.create(sp)
    objective = SftObjective(model, layout)
    base = model.get_base_model() if lora else model
    layers = list(base.get_decoder().layers)
    groups, keeps = [], [LayerKeep(i) for i in range(len(layers))]
    if policy in ("fused", "auto"):
        groups = [fuse_linears(layer) for layer in layers]
        if not changes.get("model_type"):
            assert [len(g) for g in groups] == [4, 4]  # q/k/v, o, gate/up, down
        store = HostStore(torch.device("cpu"))
        for keep, own in zip(keeps, groups, strict=True):  # every group but one on the "host"
            keep.on_device, keep.on_host, keep.store = own[:1], own[1:], store
        if stage == 3:
            for layer, own in zip(layers, groups, strict=True):
                gather_with(layer, (weight for g in own for weight in g.tensors))
    experts = []
    if policy == "grouped":
        for keep, fused in zip(keeps, (fuse_and_tile(layer, stage, 7) for layer in layers), strict=True):
            keep.last, groups, experts = fused.last, [*groups, fused.groups], experts + fused.experts
        assert len(experts) == len(layers)
        unhook(m for m in model.modules() if next(m.parameters(), None) is None)
    if stage == 3:
        gather_state_layers(base)
    of_torch = {"fused": "keep_attention", "grouped": "full"}.get(policy, policy)
    apply_recompute(layers, of_torch, keep=keeps if policy in ("auto", "grouped") else None)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=torch.optim.SGD(trained.values(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    for held in [*experts, *(group for own in groups for group in own)]:
        held.unhook()
    packs = packs_of_step(accumulation, layout.dp, sp, sample, only_first_half)
    if whole:
        packs = [dealt(pack, sp) for pack in packs]
    weight = sum(float(p.loss_weights.sum(dtype="float64")) for p in packs)
    total = torch.zeros((), dtype=torch.float64)
    for i, pack in enumerate(packs[layout.dp_rank :: layout.dp]):
        if i:
            engine.step()
        loss = engine(shard(pack, layout, torch.device("cpu")))
        total += loss.detach() / weight
        engine.backward(loss * world / weight, scale_wrt_gas=False)
    grads = {n: safe_get_full_grad(p).clone() for n, p in trained.items()}
    engine.step()
    dist.all_reduce(total)
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return (float(total), None if norm is None else float(norm), grads) if rank == 0 else None


def baseline_step(
    accumulation: int, dp: int, lora: Any, changes: dict[str, Any], sample: bool, sp: int, half: bool
) -> Any:
    """The same from one process in float64. Packs are padded alike: what the halves are depends on it."""
    model = prepared(
        tiny_model(tiny_config(**{"model_type": "llama", **changes}), attn="dense", dtype=torch.float32, std=STD),
        with_experts(lora, changes),
        dense=True,
    ).double()
    packs = packs_of_step(accumulation, dp, sp, sample, half)
    weight = sum(float(p.loss_weights.sum(dtype="float64")) for p in packs)
    loss = sum(reference_sum(model, p) for p in packs) / weight
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


CASES = [
    # world, sp, stage, accumulation, LoRA, policy, config changes, sample weighting, targets in the first half only
    (2, 2, 0, 1, False, "full", {}, False, False),
    pytest.param(2, 2, 1, 3, True, "keep_attention", {}, False, False, marks=pytest.mark.slow),
    (2, 2, 2, 1, False, "keep_attention", {}, True, False),
    (2, 2, 3, 3, False, "keep_attention", {}, False, False),
    (2, 2, 3, 1, True, "keep_attention", {}, False, True),
    pytest.param(2, 2, 3, 1, False, "none", TIED, False, True, marks=pytest.mark.slow),
    pytest.param(2, 1, 3, 3, True, "full", {}, True, False, marks=pytest.mark.slow),
    pytest.param(2, 1, 0, 1, True, "none", {}, False, False, marks=pytest.mark.slow),
    (4, 4, 3, 1, True, "keep_attention", {}, False, False),
    (4, 4, 3, 1, False, "keep_attention", HEADS_9_3, False, False),
    pytest.param(4, 4, 0, 3, True, "keep_attention", HEADS_9_3, False, False, marks=pytest.mark.slow),
    (4, 2, 3, 3, True, "keep_attention", {}, True, False),
    pytest.param(4, 2, 3, 1, False, "sqrt", HEADS_9_3, False, False, marks=pytest.mark.slow),
    pytest.param(4, 2, 2, 3, False, "keep_attention", {}, False, False, marks=pytest.mark.slow),
    pytest.param(4, 2, 1, 1, True, "full", {}, False, True, marks=pytest.mark.slow),
    (4, 2, 0, 3, False, "every_k", TIED, True, False),
    (2, 2, 3, 3, True, "fused", {}, False, False),
    (2, 2, 3, 1, False, "auto", {}, False, True),
    (4, 2, 3, 1, True, "auto", HEADS_9_3, True, False),
    pytest.param(2, 1, 2, 3, True, "auto", {}, False, False, marks=pytest.mark.slow),
    (2, 2, 1, 1, False, "auto", {"attention_bias": True}, False, False),
    (2, 2, 3, 3, True, "grouped", EXPERTS, True, False),
    (2, 2, 3, 1, False, "grouped", EXPERTS, False, True),
    pytest.param(2, 1, 2, 3, True, "grouped", EXPERTS, False, False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "sp", "stage", "accumulation", "lora", "policy", "changes", "sample", "half"), CASES)
def test_engine_equals_one_process(pools, world, sp, stage, accumulation, lora, policy, changes, sample, half):
    found = pools(world).run(one_step, sp, stage, accumulation, lora, policy, changes, sample, half)[0]
    assert_equal(found, baseline_step(accumulation, world // sp, lora, changes, sample, sp, half))


def assert_equal(found: Any, truth: Any) -> None:
    """Loss, every gradient and, where the engine knows one, their norm: to 1e-6."""
    (loss, norm, grads), (ref_loss, ref) = found, truth
    assert loss == pytest.approx(ref_loss, rel=1e-6)
    assert set(grads) == set(ref)
    assert {n: f"{e:.1e}" for n in ref if (e := relative_error(grads[n], ref[n])) > 1e-6} == {}
    whole = torch.cat([g.flatten().double() for g in ref.values()]).norm()
    if norm is not None:
        assert norm == pytest.approx(float(whole), rel=1e-6)
