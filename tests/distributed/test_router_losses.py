"""Losses of routers over a step: the gradients of one process that calls transformers' own loss on all tokens, whatever
sp, dp, accumulation and padding are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.router_losses import RouterLosses
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.train.install import fuse_and_tile
from ds_longft.train.step import backpropagate
from tests.distributed.models import make_pack, relative_error, tiny_config, tiny_model
from tests.distributed.test_dpo_exact import PlainEngine
from tests.distributed.test_exact import SINKS, prepared

PACKS = ([20, 1, 50, 26], [97], [3, 3, 40, 7, 9], [33, 30])
AUX, Z = 0.3, 0.05
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "sliding_window": None,
}
DEVICE = torch.device("cpu")


class Engine(PlainEngine):
    """With the micro-steps that the loop tells it of."""

    def step(self) -> None: ...


def packs_of(multiple: int) -> list[Any]:
    return [make_pack(each, seed=i, multiple=multiple) for i, each in enumerate(PACKS)]


def ours(rank: int, world: int, family: str, changes: dict[str, Any], lora: Any, sp: int) -> Any:
    """Loss, both routers' losses, and every gradient of a step of all packs, through the trainer's own backward pass."""
    register()
    model = prepared(tiny_model(tiny_config(family, **changes), attn=ULYSSES, dtype=torch.float64), lora)
    layout = ParallelLayout.create(sp)
    objective = SftObjective(model, layout, router_factors=(AUX, Z))
    layers = (model.get_base_model() if lora else model).get_decoder().layers
    keeps = [LayerKeep(i) for i in range(len(layers))]
    for keep, layer in zip(keeps, layers, strict=True):
        keep.last = fuse_and_tile(layer, 2, None).last
    apply_recompute(layers, "keep_attention", keep=keeps)
    packs = packs_of(sp)[layout.dp_rank :: layout.dp]
    weight = sum(float(p.loss_weights.sum(dtype="float64")) for p in packs_of(sp))
    engine, of_packs = Engine(objective), []
    plain, objective.backpropagate = objective.backpropagate, lambda *a: of_packs.append(plain(*a)) or of_packs[-1]  # type: ignore
    backpropagate(engine, packs, weight, layout, DEVICE)
    sums = torch.stack(of_packs).sum(0)
    grads = {n: p.grad / world for n, p in model.named_parameters() if p.grad is not None}
    for tensor in (sums, *grads.values()):
        dist.all_reduce(tensor)
    return (sums / weight, grads) if rank == 0 else None


def truth(family: str, changes: dict[str, Any], lora: Any) -> Any:
    """Each document alone, the routers' logits of all of them together."""
    model = prepared(tiny_model(tiny_config(family, **changes), attn="dense", dtype=torch.float64), lora)
    config, losses, weight, logits = model.config, [], 0.0, []
    for pack in packs_of(1):
        for a, b in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False):
            out = model(
                input_ids=torch.from_numpy(pack.input_ids[None, a:b]), output_router_logits=True, use_cache=False
            )
            labels, weights = torch.from_numpy(pack.labels[a:b]), torch.from_numpy(pack.loss_weights[a:b])
            ce = torch.nn.functional.cross_entropy(out.logits[0], labels, reduction="none")
            losses.append((ce * weights).sum())
            weight += float(weights.sum())
            logits.append(out.router_logits)
    of_layers = [torch.cat(each).float() for each in zip(*logits, strict=True)]
    count, used = of_layers[0].shape[-1], config.num_experts_per_tok
    aux = sum(load_balancing_loss_func((each,), count, used) for each in of_layers) / len(of_layers)
    z = sum(each.logsumexp(-1).square().mean() for each in of_layers) / len(of_layers)
    loss = sum(losses) / weight
    (loss + AUX * aux + Z * z).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack([loss, aux, z]).detach().double(), grads


CASES = [
    ("mixtral", EXPERTS, False, 2, 2),  # four packs, one after the other
    ("qwen3_moe", EXPERTS, {"experts": True}, 2, 2),
    ("qwen3_moe", EXPERTS, False, 4, 1),  # one pack a rank: known between forward and backward
    ("gpt_oss", SINKS, {"alpha": 4}, 4, 2),
    ("olmoe", EXPERTS, {"targets": ["q_proj"]}, 2, 1),
]


@pytest.mark.parametrize(("family", "changes", "lora", "world", "sp"), CASES)
def test_gradients_equal_one_process(pools: Any, family: str, changes: Any, lora: Any, world: int, sp: int) -> None:
    (values, grads), (expected, ref) = (
        pools(world).run(ours, family, changes, lora, sp)[0],
        truth(family, changes, lora),
    )
    assert torch.allclose(values, expected, rtol=1e-6, atol=0), (values, expected)
    errors = {name: relative_error(grads[name], ref[name]) for name in ref}
    assert {name: f"{e:.1e}" for name, e in errors.items() if not e <= 1e-6} == {}


def test_a_model_without_routers_is_refused() -> None:
    model = tiny_model(tiny_config(), attn="dense", dtype=torch.float32)
    with pytest.raises(ModelError, match="llama has no routers that tell transformers their logits"):
        RouterLosses(model.get_decoder(), 0.1, 0.0)
