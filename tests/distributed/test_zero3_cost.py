"""ZeRO-3 divides weights; it is to compute and keep no more than ZeRO-2 does, on a model as a run builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_longft.layout import ParallelLayout
from tests.distributed.models import make_pack, tiny_config


def cost_of_a_pass(rank: int, world: int, folder: str, stage: int, keys: dict[str, Any]) -> Any:
    """Operations and peak bytes of one forward and backward pass."""
    from ds_longft.config import RunConfig
    from ds_longft.ds_config import load_ds_config, merge_ds_config
    from ds_longft.train.engine import build
    from ds_longft.train.speed import dry_pass
    from tests.unit.plan.tracked import Tracker

    config = RunConfig.model_validate(
        {
            "ds_config": f"ds_configs/zero{stage}_sp.json",
            "sp": world,
            "model": {"path": folder, "random_weights": True},
            "data": {"train": ["unused.jsonl"], "max_length_tokens": 4096},
            **keys,
        }
    )
    settings = merge_ds_config(load_ds_config(config.ds_config), config, world=world, device="cpu", hidden_size=64)
    layout, device = ParallelLayout.create(world), torch.device("cpu")
    built = build(config, settings.engine, layout, device)
    pack = make_pack([3000, 1096], seed=0, multiple=world)
    dry_pass(built.engine, pack, layout, device)  # ZeRO-3 learns the order of the modules
    with Tracker() as tracker:
        dry_pass(built.engine, pack, layout, device)
    built.engine.destroy()
    return tracker.operations, tracker.peak


KEYS = {
    "lora": {"lora": {"r": 8}, "train": {"recompute": "keep_attention"}},
    "lora in tiles": {"lora": {"r": 8}, "train": {"recompute": "full", "mlp_tile_tokens": 256}},
    "all weights": {"lora": None, "train": {"recompute": "full"}},
    "all weights in tiles": {"lora": None, "train": {"recompute": "full", "mlp_tile_tokens": 256}},
}


@pytest.mark.parametrize("name", KEYS)
def test_zero3_costs_no_more_than_zero2(pools: Any, tmp_path: Path, name: str) -> None:
    """DeepSpeed's hooks hand modules new tensors: linears of one input once took them for several, and ran twice."""
    shape = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 6, "max_position_embeddings": 4096}
    config = tiny_config("llama", **shape)
    config.save_pretrained(tmp_path)
    two, three = (pools(2).run(cost_of_a_pass, str(tmp_path), stage, KEYS[name])[0] for stage in (2, 3))
    assert three[0] == two[0]
    assert three[1] < 1.05 * two[1]
