"""The proof for preference pairs, without the engine in float64: any split over ranks, one pass or two, any place the
reference comes from: the loss and every gradient of one process to 1e-10.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_longft.config.run_config import DpoConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.packed import unpack
from ds_longft.objectives.dpo import DpoObjective
from ds_longft.objectives.pair_loss import METRICS
from ds_longft.objectives.passes import backpropagate_pairs, evaluate_pairs, reference_logps
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.recompute import apply_recompute
from ds_longft.train.install import fuse_and_tile
from tests.distributed.dpo_cases import PairLengths, baseline_step, pair_pack
from tests.distributed.models import packed, tiny_config, tiny_model
from tests.distributed.test_exact import DYNAMIC, assert_equal, install, prepared

PACKS: tuple[PairLengths, ...] = ([(20, 5, 9), (3, 30, 1)], [(1, 1, 40)], [(17, 8, 8), (2, 3, 4), (30, 1, 2)])
WEIGHTS = ([1.0, 0.5], [2.0], None)
CPU = torch.device("cpu")


class PlainEngine:
    """As much of an engine as a pack of pairs asks for: calls the module, runs backward."""

    def __init__(self, module: DpoObjective) -> None:
        self.module = module
        self._is_gradient_accumulation_boundary = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def set_gradient_accumulation_boundary(self, value: Any) -> None:
        self._is_gradient_accumulation_boundary = value

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()


def one_step(
    rank: int, world: int, dpo: dict[str, Any], lora: Any, changes: dict[str, Any], policy: str, sp: int,
    packs: tuple[PairLengths, ...] = PACKS,
) -> Any:  # fmt: skip
    """Loss, every gradient and the metrics of one step over `packs`, on `world` ranks in groups of `sp`."""
    register()
    base = tiny_model(tiny_config("llama", **changes), attn=ULYSSES, dtype=torch.float64)
    second = None
    if not lora and dpo.get("reference") != "precomputed" and dpo.get("loss") != "simpo":
        second = shaken(copy.deepcopy(base)).requires_grad_(False)
    model = prepared(base, lora)
    layout = ParallelLayout.create(sp)
    turns = 1 if policy == "host" else None
    objective = DpoObjective(model, layout, DpoConfig(**dpo), reference_model=second, kv_heads_at_a_time=turns)
    layers = list((model.get_base_model() if lora else model).get_decoder().layers)
    if policy in ("fused", "tiles"):
        of_second = list(second.get_decoder().layers) if second is not None else []
        for layer in layers + of_second:
            fuse_and_tile(layer, 0, 7 if policy == "tiles" else None)
    if policy == "host":  # as a run is set up whose longest pair hardly fits
        install(layers, "auto", {"tile": 7, "host": ("input", "attention")})
    else:
        apply_recompute(layers, {"fused": "keep_attention", "tiles": "full"}.get(policy, policy))
    engine = PlainEngine(objective)
    made = [pair_pack(each, seed=i, multiple=sp, weights=WEIGHTS[i]) for i, each in enumerate(packs)]
    if dpo.get("reference") == "precomputed":
        made = [precomputed(engine, pack, layout) for pack in made]
    weight = sum(float(pack.pairs.weights.sum()) for pack in made)
    sums = torch.zeros(1 + len(METRICS), dtype=torch.float64)
    evaluated = torch.zeros_like(sums)
    for pack in made[layout.dp_rank :: layout.dp]:
        evaluated += evaluate_pairs(engine, pack, layout, CPU)
        sums += backpropagate_pairs(engine, pack, 1 / weight, layout, CPU)
    grads = {
        n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad
    }
    for tensor in (sums, evaluated, *grads.values()):
        dist.all_reduce(tensor)
    assert (sums - evaluated).abs().max() < 1e-12 * sums.abs().max()
    return (float(sums[0]) / weight, grads, (sums / weight).tolist()) if rank == 0 else None


def precomputed(engine: PlainEngine, pack: Any, layout: ParallelLayout) -> Any:
    reference = reference_logps(engine, pack, layout, CPU).numpy()
    pairs = type(pack.pairs)(pack.pairs.weights, reference)
    return dataclasses.replace(pack, pairs=pairs)


def shaken(model: Any) -> Any:
    """Another model of the same shape: what was trained before it became a reference."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.01)
    return model


def truth(dpo: dict[str, Any], lora: Any, changes: dict[str, Any], packs: tuple[PairLengths, ...] = PACKS) -> Any:
    base = tiny_model(tiny_config("llama", **changes), attn="dense", dtype=torch.float64)
    plain = copy.deepcopy(base)
    if not lora and dpo.get("reference") != "precomputed":
        plain = shaken(plain)
    if isinstance(lora, dict) and "base" in lora:  # of a quantised base too the reference is what adapters are on
        packed(plain, lora["base"])
        unpack(plain)
    made = [pair_pack(each, seed=i, weights=WEIGHTS[i]) for i, each in enumerate(packs)]
    return baseline_step(prepared(base, lora, dense=True), plain, made, DpoConfig(**dpo))


HEADS_9_3 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}
HEAD = {"targets": ["q_proj", "lm_head"]}
WHOLE_HEAD = {"modules_to_save": ["lm_head", "embed_tokens"]}
TIED = {"tie_word_embeddings": True}

CASES = [
    # dpo, LoRA, config changes, recompute policy, world, sp
    ({"passes": "one"}, True, {}, "keep_attention", 2, 1),
    ({"passes": "one"}, True, {}, "fused", 2, 2),
    ({"passes": "two"}, True, {}, "fused", 2, 2),
    ({"passes": "one", "label_smoothing": 0.2, "rpo_alpha": 0.7}, True, HEADS_9_3, "fused", 4, 4),
    ({"passes": "two", "label_smoothing": 0.2, "rpo_alpha": 0.7}, True, HEADS_9_3, "keep_attention", 4, 2),
    ({"passes": "one", "loss": "ipo", "beta": 0.3}, HEAD, {}, "none", 2, 2),
    ({"passes": "two", "loss": "ipo", "beta": 0.3}, WHOLE_HEAD, {}, "full", 2, 2),
    ({"passes": "one"}, WHOLE_HEAD, TIED, "fused", 2, 2),
    ({"passes": "one", "loss": "simpo", "beta": 2.0, "simpo_gamma": 1.1}, True, {}, "fused", 2, 2),
    ({"passes": "two", "loss": "simpo", "beta": 2.0, "label_smoothing": 0.1}, False, {}, "sqrt", 4, 2),
    ({"passes": "one"}, False, TIED, "keep_attention", 4, 4),
    ({"passes": "two"}, False, {}, "full", 2, 1),
    ({"passes": "one"}, True, {}, "tiles", 2, 2),
    ({"passes": "two"}, False, {}, "tiles", 2, 2),
    ({"passes": "one"}, True, {}, "host", 2, 2),
    ({"passes": "two"}, True, {}, "host", 2, 1),
    ({"passes": "one"}, {"base": "nf4"}, {}, "fused", 2, 2),
    ({"passes": "two"}, {"base": "int8"}, {}, "host", 2, 1),
    pytest.param({"passes": "two", "reference": "precomputed"}, {"base": "fp8"}, {}, "tiles", 2, 2, marks=pytest.mark.slow),
    ({"passes": "one", "reference": "precomputed"}, True, {}, "fused", 2, 2),
    ({"passes": "two", "reference": "precomputed"}, False, {}, "keep_attention", 4, 2),
    ({"passes": "two", "reference": "precomputed"}, WHOLE_HEAD, {}, "fused", 3, 3),
    ({"passes": "one"}, True, DYNAMIC, "fused", 2, 2),
    ({"passes": "two"}, False, DYNAMIC, "keep_attention", 4, 2),
    ({"passes": "one", "reference": "precomputed"}, True, DYNAMIC, "fused", 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(("dpo", "lora", "changes", "policy", "world", "sp"), CASES)
def test_loss_and_gradients_equal_one_process(pools, dpo, lora, changes, policy, world, sp):
    loss, grads, means = pools(world).run(one_step, dpo, lora, changes, policy, sp)[0]
    assert_equal((loss, grads), truth(dpo, lora, changes))
    assert means[0] == pytest.approx(loss, rel=1e-12)
