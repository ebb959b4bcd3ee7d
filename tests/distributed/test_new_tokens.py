"""Tokens added to a model: their rows' gradients are those of one process, and what is saved opens elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_longft.config.run_config import LoraConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import add_lora
from ds_longft.model.new_tokens import widen
from ds_longft.objectives.sft import SftObjective
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.sequence.shard import shard
from tests.distributed.models import VOCAB, make_pack, reference_sum, relative_error, tiny_config, tiny_model

NEW = [VOCAB, VOCAB + 1]


def with_new_tokens(attn: str, tied: bool, lora: dict[str, Any]) -> Any:
    model = tiny_model(tiny_config("llama", tie_word_embeddings=tied), attn=attn, dtype=torch.float64)
    widen(model, VOCAB + 2)
    model = add_lora(model, LoraConfig(r=4, **lora), seed=1, train_rows=NEW)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                p.normal_(0, 0.1)
    return model


def packs(multiple: int = 1) -> list[Any]:
    """The new tokens are read, and asked for."""
    made = [make_pack(lengths, seed=i, multiple=multiple) for i, lengths in enumerate(([20, 1, 30], [44]))]
    for pack in made:
        for at in range(3, 40, 4):
            pack.input_ids[at] = NEW[at % 2]
            if pack.loss_weights[at]:
                pack.labels[at] = NEW[at % 2]
    return made


def gradients(rank: int, world: int, tied: bool, lora: dict[str, Any]) -> Any:
    register()
    layout = ParallelLayout.create(world)
    model = with_new_tokens(ULYSSES, tied, lora)
    objective = SftObjective(model, layout)
    total = torch.zeros((), dtype=torch.float64)
    for pack in packs(world):
        loss = objective(shard(pack, layout, torch.device("cpu")))
        loss.backward()
        total += loss.detach()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for tensor in (total, *grads.values()):
        dist.all_reduce(tensor)
    return (float(total), grads) if rank == 0 else None


CASES = {
    "own head": (False, {}),
    "tied": (True, {}),
    "whole head": (False, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_new_tokens_under_sp(pools, name):
    tied, lora = CASES[name]
    loss, grads = pools(2).run(gradients, tied, lora)[0]
    model = with_new_tokens("dense", tied, lora)
    truth = sum(reference_sum(model, pack) for pack in packs())
    truth.backward()
    assert loss == pytest.approx(float(truth), rel=1e-10)
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert sum("trainable_tokens_delta" in name for name in expected) == (1 if tied or lora else 2)
    assert set(expected) <= set(grads)
    assert {n: e for n in expected if (e := relative_error(grads[n], expected[n])) > 1e-10} == {}
