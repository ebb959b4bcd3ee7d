"""What a model draws at random in training is found under the names that models give it."""

from __future__ import annotations

import pytest
import torch

from ds_longft.model.dropout import random_rates, without_dropout
from tests.distributed.models import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("family", "key"),
    [("mixtral", "router_jitter_noise"), ("phimoe", "router_jitter_noise"), ("phimoe", "input_jitter_noise")],
)
def test_noise_on_routers(family: str, key: str) -> None:
    """Phi-3.5-MoE's was left on: it blurred the reference of preference pairs."""
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0, key: 0.125}
    model = tiny_model(tiny_config(family, **changes), attn="eager", dtype=torch.float32)
    rates = random_rates(model)
    assert {rate for _, _, rate in rates} == {0.125}
    with without_dropout(model):
        assert random_rates(model) == []
    assert len(random_rates(model)) == len(rates)
