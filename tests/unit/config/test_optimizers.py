"""What an optimizer does not go with is said before a model is loaded, with the key to change."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from ds_longft.config.ds_json import merge_ds_config
from ds_longft.config.optimizers import KINDS
from ds_longft.config.run_config import OptimConfig, RunConfig
from ds_longft.config.train_keys import OptimizerName
from ds_longft.errors import ConfigError
from ds_longft.train.make_optimizer import make_optimizer

MUON = {"type": "muon", "max_grad_norm": None}


def problems(stage: int = 2, raw: dict[str, Any] | None = None, **sections: Any) -> str:
    """Every problem of a config and a DeepSpeed JSON; "" without one."""
    try:
        config = RunConfig.model_validate({"data": {"train": ["x.jsonl"]}, "lora": None, **sections})
        ds = {"zero_optimization": {"stage": stage}, **(raw or {})}
        merge_ds_config(ds, config, world=2, device="cpu", hidden_size=64)
    except (ValueError, ConfigError) as error:
        return str(error)
    return ""


def test_every_name_is_described() -> None:
    assert set(KINDS) == set(get_args(OptimizerName))


@pytest.mark.parametrize(
    ("stage", "optim", "says"),
    [
        (0, {"type": "adafactor"}, ""),
        (2, {"type": "adafactor"}, "stage is 2, but optim.type is adafactor: ZeRO cuts matrices"),
        (1, {"type": "adafactor"}, "Set ds_config to ds_configs/zero0.json"),
        (0, {"type": "adafactor", "betas": [0.8, 0.9]}, "optim.betas is given, but optim.type is adafactor"),
        (2, {"type": "schedule_free", "schedule": "constant"}, ""),
        (3, {"type": "schedule_free", "schedule": "constant"}, "Set ds_config to ds_configs/zero2_sp.json"),
        (2, {"type": "schedule_free"}, "optim.schedule is cosine, but optim.type is schedule_free"),
        (2, {"type": "schedule_free", "schedule": "constant", "betas": [0, 0.9]}, "optim.betas begins with 0"),
        (3, {"type": "adamw_8bit"}, ""),
        (3, {**MUON, "adam_learning_rate": 1e-4}, ""),
        (2, {"type": "muon", "adam_learning_rate": 1e-4}, "optim.max_grad_norm is 1, but optim.type is muon"),
        (2, MUON, "optim.adam_learning_rate is missing"),
        (2, {"adam_learning_rate": 1e-4}, "optim.adam_learning_rate is given, but optim.type is not muon"),
    ],
)
def test_stages_and_keys(stage: int, optim: dict[str, Any], says: str) -> None:
    found = problems(stage, optim=optim)
    assert says in found
    assert bool(found) == bool(says)


def test_muon_alone_trains_adapters() -> None:
    assert problems(optim=MUON, lora={"r": 4}) == ""
    assert "adam_learning_rate is missing" in problems(optim=MUON, lora={"r": 4, "modules_to_save": ["lm_head"]})
    assert "train.verify_first" in problems(optim=MUON, lora={"r": 4}, train={"verify_first": True})


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"adamw", "sgd"}))
def test_nothing_else_names_or_moves_it(kind: str) -> None:
    beside = {"schedule_free": {"schedule": "constant"}, "muon": {"max_grad_norm": None, "adam_learning_rate": 1e-4}}
    optim = {"type": kind, **beside.get(kind, {})}
    named = {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    assert "there is a section optimizer" in problems(0, named, optim=optim)
    away = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert f"optim.type is {kind}, whose state stays on the GPU" in problems(2, away, optim=optim)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "adafactor", "schedule_free", "sgd"])
def test_bytes_of_a_state_are_those_of_the_library(kind: str) -> None:
    """Of an adapter of rank 16. Muon's is half of what is said: DeepSpeed keeps the next momentum beside it."""
    layer = torch.nn.Linear(4096, 16, bias=False)
    optimizer = make_optimizer(layer, OptimConfig(type=kind), fused=False)  # type: ignore[arg-type]
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    tensors = [v for k, v in optimizer.state[layer.weight].items() if torch.is_tensor(v) and not k.startswith("qmap")]
    size = sum(t.nbytes for t in tensors) / layer.weight.numel()
    assert size == pytest.approx(KINDS[kind].state_bytes, abs=0.01)
