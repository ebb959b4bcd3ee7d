"""A model's own dropout and its routers' noise: a recomputed layer draws what its first call drew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_longft.layout import ParallelLayout
from ds_longft.model.dropout import random_rates
from tests.distributed.models import built_engine, make_pack, relative_error, tiny_config, tiny_model

CPU = torch.device("cpu")
RANDOM = {
    "Phi-2, dropout": ("phi", {"resid_pdrop": 0.1}),
    "Starcoder2, dropout as a function": ("starcoder2", {"residual_dropout": 0.1, "attention_dropout": 0.0}),
    "Mixtral, noise on routers": ("mixtral", {"router_jitter_noise": 0.1, "num_local_experts": 4}),
}


def built(folder: str, world: int, **keys: Any) -> tuple[Any, ParallelLayout]:
    """All weights of the saved model, trained at ZeRO stage 0."""
    model, data = {"path": folder}, {"train": ["unused.jsonl"], "max_length_tokens": 256}
    return built_engine(folder, {}, world, model=model, data=data, lora=None, optim={"type": "sgd"}, **keys)


def gradients(rank: int, world: int, folder: str, recompute: str) -> Any:
    """Loss and gradients of one pack."""
    from ds_longft.exactness.engine_step import step_gradients, weights_held
    from ds_longft.train.step import backpropagate

    engine, layout = built(folder, world, train={"recompute": recompute})
    torch.manual_seed(7)
    with weights_held(engine):
        found = step_gradients(engine, backpropagate, [make_pack([60], seed=1)], 1.0, layout, CPU)
    engine.destroy()
    return found.loss, found.grads


def rates_of_pairs(rank: int, world: int, folder: str) -> Any:
    """What is drawn at random in training on pairs, the frozen reference included."""
    from ds_longft.model.dropout import random_rates

    engine, _ = built(folder, world, objective="dpo", dpo={"reference": "model"})
    rates = [rate for _, _, rate in random_rates(engine.module)]
    engine.destroy()
    return rates


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("recompute", ["full", "keep_attention", "sqrt"])
def test_recomputation_draws_the_same_masks(pools: Any, tmp_path: Path, name: str, recompute: str) -> None:
    """Without the random state, gradients were off by 6 to 66 %, while the loss was right."""
    family, changes = RANDOM[name]
    tiny_model(tiny_config(family, **changes), attn="eager", dtype=torch.float32).save_pretrained(tmp_path)
    loss, grads = pools(1).run(gradients, str(tmp_path), "none")[0]
    ours, again = pools(1).run(gradients, str(tmp_path), recompute)[0]
    assert ours == loss
    assert {n: e for n, g in grads.items() if (e := relative_error(again[n], g)) > 1e-5} == {}


@pytest.mark.parametrize("name", RANDOM)
def test_pairs_are_compared_without(pools: Any, tmp_path: Path, name: str) -> None:
    """It would blur the reference, and two passes would draw two masks."""
    family, changes = RANDOM[name]
    model = tiny_model(tiny_config(family, **changes), attn="eager", dtype=torch.float32)
    assert random_rates(model)
    model.save_pretrained(tmp_path)
    assert pools(1).run(rates_of_pairs, str(tmp_path)) == [[]]
