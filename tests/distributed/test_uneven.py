"""Experts that only one rank's tokens go to: every ZeRO stage gives the gradients of one process, and none hangs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ds_longft.batch import Pack
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.recompute import LayerKeep, apply_recompute
from ds_longft.sequence.shard import shard
from ds_longft.sequence.uneven import reach_experts
from ds_longft.train.install import fuse_and_tile
from tests.distributed.models import VOCAB, make_pack, reference_sum, tiny_config, tiny_model
from tests.distributed.test_engine import LORA, STD
from tests.distributed.test_exact import LATENT, prepared
from tests.unit.sequence.zoo import in_double

TOKENS = (40, 24)
LOW, HIGH = range(3, VOCAB // 2), range(VOCAB // 2, VOCAB)
"""Token ids of the two ranks: what decides which experts they go to."""

LONGCAT = {
    **LATENT, "num_layers": 2, "n_routed_experts": 4, "zero_expert_num": 4, "moe_topk": 2, "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 48, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip


class Listed(nn.Module):
    """A mixture as remote code writes it: a list of experts, and only those are called that a token goes to."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, 2, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, 24), nn.SiLU(), nn.Linear(24, hidden)) for _ in "01"
        )

    def forward(self, x: Tensor) -> Tensor:
        scores, out = self.gate(x).softmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (tokens := scores.argmax(-1) == i).any():
                out[tokens] = expert(x[tokens]) * scores[tokens][:, i, None]
        return out


def model_of(kind: str, lora: bool, attn: str) -> Any:
    """The first feature of a token says which half of the ids it is of, in all layers, and routers read it alone."""
    family, changes = ("longcat_flash", LONGCAT) if kind == "identities" else ("llama", {})
    model: Any = tiny_model(tiny_config(family, **changes), attn=attn, dtype=torch.float32, std=STD)
    with torch.no_grad():
        half = model.get_input_embeddings().weight[:, 0]
        half[: HIGH.start], half[HIGH.start :] = 3, -3
        for layer in model.get_decoder().layers:
            if kind == "listed":
                layer.mlp = Listed(model.config.hidden_size)
                for p in layer.mlp.parameters():
                    p.normal_(0, STD)
            for name, p in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "experts.1.2.weight", "experts.0.2.weight")):
                    p[0] = 0
                if name.endswith(("experts.1.2.bias", "experts.0.2.bias")):
                    p[0] = 0
                if name.endswith("experts.down_proj"):
                    p[:, 0] = 0
                if name.endswith(("classifier.weight", "gate.weight")):
                    p[:, 0] = torch.tensor([0.5, -0.5]).repeat_interleave(len(p) // 2)
    return prepared(model, lora and {**LORA, "experts": kind == "identities"})


def the_pack() -> Pack:
    """One document and a half on each rank's side of the border."""
    pack, rng = make_pack(TOKENS, seed=0), np.random.default_rng(0)
    half = pack.tokens // 2
    ids = np.concatenate([rng.choice(LOW, half), rng.choice(HIGH, pack.tokens - half)])
    return replace(pack, input_ids=ids.astype(np.int64))


def one_step(rank: int, world: int, kind: str, lora: bool, stage: int, segments: bool) -> Any:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    register()
    model, layout = model_of(kind, lora, ULYSSES), ParallelLayout.create(world)
    objective = SftObjective(model, layout)
    layers = list((model.get_base_model() if lora else model).get_decoder().layers)
    keeps, held = [LayerKeep(i) for i in range(len(layers))], []
    for keep, layer in zip(keeps, layers, strict=True):
        if segments:
            held += reach_experts(layer, (), stage)
            continue
        fused = fuse_and_tile(layer, stage, None)
        keep.last, held = fused.last, [*held, *fused.groups, *fused.experts, *fused.uneven]
        assert len(fused.uneven) == 1
    apply_recompute(layers, "sqrt" if segments else "keep_attention", keep=keeps)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=torch.optim.SGD(trained.values(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    for each in held:
        each.unhook()
    pack = the_pack()
    for _ in range(2):  # ZeRO-3 gathers the second time as it has seen it the first time
        loss = engine(shard(pack, layout, torch.device("cpu")))
        engine.backward(loss * world / float(pack.loss_weights.sum()))
        grads = {n: safe_get_full_grad(p).clone() for n, p in trained.items()}
        engine.optimizer.param_groups[0]["lr"] = 0.0
        engine.step()
    engine.destroy()
    return grads if rank == 0 else None


@pytest.mark.parametrize(
    ("kind", "lora", "stage", "segments"),
    [
        ("identities", False, 0, False),
        ("identities", False, 1, False),
        ("identities", True, 2, False),
        ("identities", False, 3, False),
        ("identities", True, 3, True),
        ("listed", False, 2, False),
        ("listed", True, 3, False),
        ("listed", False, 3, True),
    ],
)
def test_every_stage_gives_the_gradients_of_one_process(
    pools: Any, kind: str, lora: bool, stage: int, segments: bool
) -> None:
    ours = pools(2).run(one_step, kind, lora, stage, segments, timeout_s=90)[0]
    model, pack = model_of(kind, lora, "dense").double(), the_pack()
    with in_double():
        (reference_sum(model, pack) / float(pack.loss_weights.sum())).backward()
    truth = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(truth) <= set(ours)
    # Of the whole gradient: a router's own is 500 times smaller, and 2e-6 of it rounding.
    whole = sum(float(g.square().sum()) for g in truth.values()) ** 0.5
    errors = {n: float((g - truth.get(n, 0 * g)).norm()) / whole for n, g in ours.items()}
    assert {n: f"{e:.1e}" for n, e in errors.items() if not e <= 1e-6} == {}
