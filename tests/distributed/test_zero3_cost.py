"""ZeRO-3 divides weights; it is to compute and keep no more than ZeRO-2 does, on a model as a run builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.models import built_engine, make_pack, tiny_config

CPU = torch.device("cpu")


def shipped(stage: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a ZeRO stage."""
    from ds_longft.config.ds_file import load_ds_config

    return load_ds_config(f"ds_configs/zero{stage}_sp.json")


def cost_of_a_pass(rank: int, world: int, folder: str, stage: int, keys: dict[str, Any]) -> Any:
    """Operations and peak bytes of one forward and backward pass."""
    from ds_longft.train.rehearse import dry_pass
    from tests.unit.decide.tracked import Tracker

    engine, layout = built_engine(folder, shipped(stage), world, sp=world, **keys)
    pack = make_pack([3000, 1096], seed=0, multiple=world)
    dry_pass(engine, pack, layout, CPU)  # ZeRO-3 learns the order of the modules
    with Tracker() as tracker:
        dry_pass(engine, pack, layout, CPU)
    engine.destroy()
    return tracker.operations, tracker.peak


def norms_of_unequal_packs(rank: int, world: int, folder: str, stage: int, keys: dict[str, Any]) -> Any:
    """Gradient norms of three steps in which each rank's pack has its own number of tiles."""
    from ds_longft.train.step import backpropagate
    from tests.distributed.dpo_cases import pair_pack

    engine, layout = built_engine(folder, shipped(stage), world, **keys)
    norms = []
    for step, lengths in enumerate(([90, 20], [30, 64], [90, 20])):
        tokens = lengths[rank]
        pairs = [(tokens // 3, tokens // 3, tokens // 3)]
        pack = pair_pack(pairs, seed=step) if "objective" in keys else make_pack([tokens], seed=step)
        backpropagate(engine, [pack], 1.0, layout, CPU)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    engine.destroy()
    return norms


KEYS = {
    "lora": {"lora": {"r": 8}, "train": {"recompute": "keep_attention"}},
    "lora in tiles": {"lora": {"r": 8}, "train": {"recompute": "full", "mlp_tile_tokens": 256}},
    "all weights": {"lora": None, "train": {"recompute": "full"}},
    "all weights in tiles": {"lora": None, "train": {"recompute": "full", "mlp_tile_tokens": 256}},
}


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        pytest.param("lora in tiles", marks=pytest.mark.slow),
        pytest.param("all weights", marks=pytest.mark.slow),
        "all weights in tiles",
    ],
)
def test_zero3_costs_no_more_than_zero2(pools: Any, tmp_path: Path, name: str) -> None:
    """DeepSpeed's hooks hand modules new tensors: linears of one input once took them for several, and ran twice."""
    shape = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 6, "max_position_embeddings": 4096}
    config = tiny_config("llama", **shape)
    config.save_pretrained(tmp_path)
    two, three = (pools(2).run(cost_of_a_pass, str(tmp_path), stage, KEYS[name])[0] for stage in (2, 3))
    assert three[0] == two[0]
    assert three[1] < 1.05 * two[1]


LORA = {"lora": {"r": 8}}
TILES = {"train": {"recompute": "full", "mlp_tile_tokens": 16}}
UNEQUAL = {
    "lora": {**LORA, **TILES},
    "all weights": {"lora": None, **TILES},
    "pairs, adapter off": {**LORA, **TILES, "objective": "dpo", "dpo": {"reference": "adapter_off"}},
    "pairs, second model": {"lora": None, **TILES, "objective": "dpo", "dpo": {"reference": "model"}},
}


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        pytest.param("all weights", marks=pytest.mark.slow),
        pytest.param("pairs, adapter off", marks=pytest.mark.slow),
        "pairs, second model",
    ],
)
def test_zero3_takes_packs_of_unequal_tiles(pools: Any, tmp_path: Path, name: str) -> None:
    """DeepSpeed compares which modules each rank called: one called once a tile stopped or hung runs of dp > 1."""
    shape = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    config = tiny_config("llama", **shape)
    config.save_pretrained(tmp_path)
    case = (norms_of_unequal_packs, str(tmp_path))
    two, three = (pools(2).run(*case, stage, UNEQUAL[name], timeout_s=60)[0] for stage in (2, 3))
    assert three == pytest.approx(two, rel=1e-4)
    assert min(two) > 0
