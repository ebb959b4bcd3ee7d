"""The proof for preference pairs through the DeepSpeed engine, in float32 with SGD: every ZeRO stage gives the gradients of
one process to 1e-6, in one pass and in two, wherever the reference comes from.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_longft.batch import Pack, Pairs
from ds_longft.config.run_config import DpoConfig
from ds_longft.data.pack import filler_pack
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.dpo import DpoObjective
from ds_longft.objectives.passes import reference_logps
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.linear import fuse_linears, gather_with
from ds_longft.sequence.recompute import apply_recompute
from ds_longft.train.step import backpropagate, backpropagate_pack
from tests.distributed.dpo_cases import PairLengths, baseline_step, pair_pack
from tests.distributed.models import relative_error, tiny_config, tiny_model
from tests.distributed.test_exact import prepared

LENGTHS: tuple[PairLengths, ...] = (
    [(20, 5, 9), (3, 30, 1)], [(1, 1, 40)], [(17, 8, 8), (2, 3, 4), (30, 1, 2)], [(33, 30, 2)], [(11, 6, 7)], [(9, 9, 9)],
)  # fmt: skip
STD = 0.05
CPU = torch.device("cpu")
HEADS_9_3 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
HEADS: dict[str, Any] = {"modules_to_save": ["lm_head"]}


def packs_of_step(count: int, multiple: int) -> list[Pack]:
    """`count` packs; the last one is a filler where there are more than one."""
    packs = [pair_pack(LENGTHS[i], seed=i, multiple=multiple) for i in range(count)]
    if count > 1:
        packs[-1] = replace(filler_pack(multiple), pairs=Pairs(packs[-1].pairs.weights[:0]))
    return packs


def one_step(
    rank: int, world: int, sp: int, stage: int, accumulation: int, lora: Any, policy: str, dpo: dict[str, Any],
    changes: dict[str, Any], rehearsed: bool,
) -> Any:  # fmt: skip
    """Loss and every gradient of one optimizer step through the engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    register()
    base = tiny_model(tiny_config("llama", **changes), attn=ULYSSES, dtype=torch.float32, std=STD)
    second = copy.deepcopy(base).requires_grad_(False) if dpo.get("reference") == "model" else None
    model = prepared(base, lora)
    layout = ParallelLayout.create(sp)
    objective = DpoObjective(model, layout, DpoConfig(**dpo), reference_model=second)
    layers = list((model.get_base_model() if lora else model).get_decoder().layers)
    if policy == "fused":
        for layer in layers:
            groups = fuse_linears(layer)
            if stage == 3:
                gather_with(layer, (weight for group in groups for weight in group.tensors))
    apply_recompute(layers, {"fused": "keep_attention"}.get(policy, policy))
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
    packs = packs_of_step(accumulation * layout.dp, sp)
    weight = sum(float(p.pairs.weights.sum()) for p in packs)
    if rehearsed:
        backpropagate_pack(engine, packs[0], 0.0, layout, CPU)
        objective.passes = "two" if objective.passes == "one" else "one"
        backpropagate_pack(engine, packs[0], 0.0, layout, CPU)
    mine = packs[layout.dp_rank :: layout.dp]
    if objective.reference == "precomputed":
        mine = [replace(p, pairs=Pairs(p.pairs.weights, reference_logps(engine, p, layout, CPU).numpy())) for p in mine]
    total = backpropagate(engine, mine, weight, layout, CPU) / weight
    grads = {n: safe_get_full_grad(p).clone() for n, p in trained.items()}
    boundary = engine.is_gradient_accumulation_boundary()
    before = {n: safe_full(p) for n, p in trained.items()}
    engine.step()
    moved = sum(float((safe_full(p) - before[n]).abs().sum()) for n, p in trained.items())
    dist.all_reduce(total)
    engine.destroy()
    assert boundary
    assert moved > 0
    return (float(total), grads) if rank == 0 else None


def safe_full(parameter: Any) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    whole = (
        safe_get_full_fp32_param(parameter)
        if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
        else None
    )
    return (parameter.detach() if whole is None else whole).clone()


CASES = [
    # world, sp, stage, accumulation, LoRA, policy, dpo, config changes, rehearsed
    pytest.param(2, 2, 0, 1, True, "fused", {"passes": "one"}, {}, False, marks=pytest.mark.slow),
    (2, 2, 0, 3, True, "fused", {"passes": "two"}, {}, False),
    (2, 2, 1, 3, True, "keep_attention", {"passes": "two"}, {}, True),
    (2, 1, 2, 1, True, "fused", {"passes": "one"}, HEADS_9_3, True),
    pytest.param(4, 2, 2, 3, True, "fused", {"passes": "two", "loss": "ipo"}, {}, False, marks=pytest.mark.slow),
    (2, 2, 3, 1, True, "fused", {"passes": "one"}, {}, False),
    (2, 2, 3, 3, True, "fused", {"passes": "two", "rpo_alpha": 0.5}, {}, True),
    pytest.param(4, 2, 3, 1, True, "fused", {"passes": "one", "label_smoothing": 0.1}, HEADS_9_3, False, marks=pytest.mark.slow),
    (4, 4, 3, 1, HEADS, "keep_attention", {"passes": "two"}, {}, False),
    (2, 2, 3, 1, False, "keep_attention", {"passes": "one", "reference": "model"}, {}, False),
    (4, 2, 3, 3, False, "full", {"passes": "two", "reference": "model"}, {}, False),
    pytest.param(2, 2, 2, 1, False, "keep_attention", {"passes": "one", "reference": "model"}, {}, False, marks=pytest.mark.slow),
    (2, 2, 3, 3, True, "fused", {"passes": "one", "reference": "precomputed"}, {}, False),
    (2, 1, 1, 1, True, "full", {"passes": "two", "reference": "precomputed"}, {}, False),
    (2, 2, 3, 1, False, "sqrt", {"passes": "one", "loss": "simpo", "beta": 2.0}, {}, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("world", "sp", "stage", "accumulation", "lora", "policy", "dpo", "changes", "rehearsed"), CASES
)
def test_engine_equals_one_process(pools, world, sp, stage, accumulation, lora, policy, dpo, changes, rehearsed):
    loss, grads = pools(world).run(one_step, sp, stage, accumulation, lora, policy, dpo, changes, rehearsed)[0]
    base = tiny_model(tiny_config("llama", **changes), attn="dense", dtype=torch.float32, std=STD)
    model = prepared(copy.deepcopy(base), lora).double()
    packs = [p for p in packs_of_step(accumulation * world // sp, sp) if len(p.pairs)]
    ref_loss, ref = baseline_step(model, base.double(), packs, DpoConfig(**dpo))
    assert loss == pytest.approx(ref_loss, rel=1e-6)
    assert set(ref) <= set(grads)
    assert {n: f"{e:.1e}" for n in ref if (e := relative_error(grads[n], ref[n])) > 1e-6} == {}
