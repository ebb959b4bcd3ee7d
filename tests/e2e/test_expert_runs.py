"""Whole runs of a mixture of experts, adapters on its experts and losses of its routers: the same however they are
split, and files that load.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from ds_longft.cli import main as cli
from tests.e2e.conftest import ROOT
from tests.e2e.job import WINDOW
from tests.e2e.test_runs import logits
from tests.faults.ranks import Launcher
from tests.tokenizer import tiny_tokenizer

STEPS = 8
RECORDED = ("loss", "router_aux_loss", "router_z_loss")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE, 4 experts of which a token takes 2."""
    folder, tokenizer = tmp_path_factory.mktemp("mixture") / "model", tiny_tokenizer()
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        max_position_embeddings=WINDOW, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recorded(output: Path) -> dict[str, list[float]]:
    """Of each step."""
    rows = [r for r in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    return {name: [row[name] for row in rows] for name in RECORDED}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_are_those_of_one_process_and_export_loads(
    mixture: Path, job: Path, ranks: Launcher, tmp_path: Path
) -> None:
    keys = [
        "--model.path",
        str(mixture),
        "--train.max_steps",
        str(STEPS),
        "--train.epochs",
        "20",
        "--lora.experts",
        "true",
    ]
    keys += ["--train.router_aux_loss", "0.05", "--train.router_z_loss", "0.01", "--data.packing", "best_fit"]
    keys += ["--train.save_every_steps", "null", "--train.eval_every_steps", "null", "--log.wandb", "off"]
    seen = {}
    for name, sp, ds_config in (("one", 1, "zero2_sp"), ("two", 2, "zero2_sp"), ("three", 2, "zero3_sp")):
        split = ["--sp", str(sp), "--ds_config", str(ROOT / "ds_configs" / f"{ds_config}.json")]
        codes, run = ranks.run(tmp_path / name, *keys, *split, world=sp)
        assert codes == [0] * sp, run.text()
        assert "each of a layer's 4 experts, not on routers" in run.text()
        seen[name] = recorded(tmp_path / name)
    assert len(seen["one"]["loss"]) == STEPS
    assert seen["one"]["loss"][-1] < 0.9 * seen["one"]["loss"][0]
    assert all(
        1.9 < aux < 4 for aux in seen["one"]["router_aux_loss"]
    )  # 2 where loads are even, 4 with one expert alone
    for name in ("two", "three"):
        for what in RECORDED:
            assert seen[name][what] == pytest.approx(seen["one"][what], rel=1e-4), (name, what)
    base = AutoModelForCausalLM.from_pretrained(mixture)
    plain = logits(base, mixture)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "three"), mixture)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    assert cli(["export", str(tmp_path / "three"), str(tmp_path / "merged")]) == 0
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), mixture)
    assert torch.allclose(merged, adapted, atol=1e-4)
