"""Loading, adding and gathering adapters under ZeRO-3: two gloo ranks, all cases in one start of the processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ds_longft.config.run_config import LoraConfig, ModelConfig
from tests.distributed.pool import WorkerPool
from tests.unit.model.tiny import WINDOW, save_tiny

TOKENS = torch.arange(1, 20)[None]
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
CASES = {
    "plain": ({}, LoraConfig(r=4)),
    "dora": ({}, LoraConfig(r=4, dora=True)),
    "tied": ({"tie_word_embeddings": True}, LoraConfig(r=4)),
    "saved": ({}, LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"])),
    "tied and saved": ({"tie_word_embeddings": True}, LoraConfig(r=4, modules_to_save=["embed_tokens"])),
    "random weights": ({}, LoraConfig(r=4)),
}


def one_case(name: str, folder: Path, rank: int) -> dict:
    """Load under ZeRO-3, add LoRA, take one optimizer step, gather and save; what was seen goes back."""
    import deepspeed

    from ds_longft.model.load import load_config, load_model
    from ds_longft.model.lora import add_lora, gather_adapter_state, save_adapter, trainable_parameters
    from ds_longft.model.rope import check_rope

    source = ModelConfig(path=str(folder / "base"), random_weights=name == "random weights")
    hf_config = load_config(source, WINDOW, attn_implementation="sdpa")
    base = load_model(source, hf_config, ds_engine_config=DS_CONFIG, dtype=torch.float32, device=torch.device("cpu"))
    seen = {"partitioned_at_load": all(p.numel() == 0 for p in base.parameters())}
    model = add_lora(base, CASES[name][1], seed=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DS_CONFIG)
    seen["rope"] = check_rope(model, hf_config)
    seen["loss_before"] = engine(input_ids=TOKENS, labels=TOKENS).loss.item()
    for _ in range(2):
        engine.backward(engine(input_ids=TOKENS, labels=TOKENS).loss)
        engine.step()
    engine.eval()
    seen["logits"] = engine(input_ids=TOKENS).logits.detach()
    seen["counts"] = trainable_parameters(model)
    state = gather_adapter_state(model)
    seen["gathered"] = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if rank == 0:
        save_adapter(model, state, folder / "run")
    engine.destroy()
    return seen


def all_cases(rank: int, world: int, folder: Path) -> dict[str, dict]:
    return {name: one_case(name, folder / name, rank) for name in CASES}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pools: Callable[[int], WorkerPool]) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("zero3")
    for name, (changes, _) in CASES.items():
        save_tiny(folder / name / "base", **changes)
    return folder, pools(2).run(all_cases, folder)


@pytest.mark.parametrize("name", CASES)
def test_weights_are_partitioned_while_they_are_read(name: str, trained: tuple[Path, list[dict]]) -> None:
    _, ranks = trained
    for seen in ranks:
        assert seen[name]["partitioned_at_load"] is (name != "random weights")
        assert seen[name]["rope"] < 1e-6


@pytest.mark.parametrize("name", [n for n in CASES if n != "random weights"])
def test_the_loaded_model_is_the_saved_one(name: str, trained: tuple[Path, list[dict]]) -> None:
    folder, ranks = trained
    plain = AutoModelForCausalLM.from_pretrained(folder / name / "base")
    truth = plain(input_ids=TOKENS, labels=TOKENS).loss.item()
    assert [seen[name]["loss_before"] for seen in ranks] == pytest.approx([truth] * 2, rel=1e-5)


def test_random_weights_are_alike_on_every_rank(trained: tuple[Path, list[dict]]) -> None:
    _, ranks = trained
    assert ranks[0]["random weights"]["loss_before"] == ranks[1]["random weights"]["loss_before"]


@pytest.mark.parametrize("name", CASES)
def test_gathered_adapter_is_whole_and_rank_zeros_alone(name: str, trained: tuple[Path, list[dict]]) -> None:
    _, (zero, one) = trained
    shapes = zero[name]["gathered"]
    assert one[name]["gathered"] == {}
    assert all(all(shape) for shape in shapes.values())
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (4, 64)
    tied_twice = 128 * 64 if name == "tied and saved" and sum(s == (128, 64) for s in shapes.values()) == 2 else 0
    assert zero[name]["counts"].trainable == sum(torch.Size(s).numel() for s in shapes.values()) - tied_twice


@pytest.mark.parametrize("name", [n for n in CASES if n != "random weights"])
def test_saved_adapter_gives_the_engines_logits_in_plain_peft(name: str, trained: tuple[Path, list[dict]]) -> None:
    folder, ranks = trained
    adapter = load_file(folder / name / "run/adapter_model.safetensors")
    moved = [t for key, t in adapter.items() if "lora_B" in key]
    assert moved
    assert all(t.abs().max() > 0 for t in moved)
    plain = AutoModelForCausalLM.from_pretrained(folder / name / "base")
    model = peft.PeftModel.from_pretrained(plain, folder / name / "run").eval()
    for seen in ranks:
        torch.testing.assert_close(model(TOKENS).logits, seen[name]["logits"], rtol=1e-4, atol=1e-4)
    config = json.loads((folder / name / "run/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / name / "base")
