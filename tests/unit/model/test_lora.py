from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from ds_longft.config.run_config import LoraConfig
from ds_longft.errors import ModelError
from ds_longft.model.lora import (
    add_lora,
    check_lora,
    gather_adapter_state,
    load_adapter,
    save_adapter,
    trainable_parameters,
)
from ds_longft.model.lora_targets import adapted_in_words
from tests.unit.model.tiny import FAMILIES, save_tiny
from tests.unit.sequence import zoo

TOKENS = torch.arange(1, 20)[None]


def base_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")


def train_a_little(model: peft.PeftModel) -> None:
    """Every trained weight moves, also the B matrices that start at zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)


@pytest.mark.parametrize("lora", [LoraConfig(r=4), LoraConfig(r=4, rslora=True), LoraConfig(r=4, dora=True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_loads_with_plain_peft_and_changes_the_output(
    family: str, lora: LoraConfig, tmp_path: Path
) -> None:
    path = save_tiny(tmp_path / "base", family)
    base = base_model(path)
    untouched = base(TOKENS).logits
    model = add_lora(base, lora, seed=3)
    assert torch.allclose(model(TOKENS).logits, untouched, atol=1e-5)
    train_a_little(model)
    save_adapter(model, gather_adapter_state(model), tmp_path / "run")
    again = peft.PeftModel.from_pretrained(base_model(path), tmp_path / "run")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert (again(TOKENS).logits - untouched).abs().max() > 0.01
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    assert config["inference_mode"] is True
    assert not model.peft_config["default"].inference_mode, "saving must not freeze the run"
    assert json.loads((tmp_path / "run/base_config/config.json").read_text())["model_type"] == base.config.model_type


def test_initialisation_follows_the_seed_and_the_models_dtype(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)

    def adapter(seed: int) -> dict[str, torch.Tensor]:
        return gather_adapter_state(add_lora(base_model(path, torch.bfloat16), LoraConfig(r=4), seed=seed))

    torch.manual_seed(5)
    first = adapter(1)
    torch.manual_seed(6)
    second, other = adapter(1), adapter(2)
    assert {t.dtype for t in first.values()} == {torch.bfloat16}
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_counts(tmp_path: Path) -> None:
    model = add_lora(base_model(save_tiny(tmp_path)), LoraConfig(r=4, targets=["q_proj"]), seed=0)
    counts = trainable_parameters(model)
    assert counts.trainable == 2 * 4 * (64 + 64)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert "weights trained" in str(counts)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_modules_are_trained_and_saved(tied: bool, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    lora = LoraConfig(r=4, modules_to_save=["embed_tokens"] if tied else ["embed_tokens", "lm_head"])
    model = add_lora(base_model(path), lora, seed=0)
    train_a_little(model)
    save_adapter(model, gather_adapter_state(model), tmp_path / "run")
    saved = load_file(tmp_path / "run/adapter_model.safetensors")
    assert any("embed_tokens" in name for name in saved)
    again = peft.PeftModel.from_pretrained(base_model(path), tmp_path / "run")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    merged = again.merge_and_unload()
    assert torch.allclose(merged(TOKENS).logits, model(TOKENS).logits, atol=1e-4)
    same = torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert same == tied


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            LoraConfig(targets=["q_proj", "k_porj"]),
            r"lora\.targets: no layer .*'k_porj' \(did you mean 'k_proj'\?\); it has: ",
        ),
        (LoraConfig(targets="qkv"), r"lora\.targets: no layer of the model is called 'qkv'.*down_proj, gate_proj"),
        (LoraConfig(modules_to_save=["wte"]), r"lora\.modules_to_save: .*'wte'.*embed_tokens"),
    ],
)
def test_names_that_match_nothing_are_refused(lora: LoraConfig, said: str, tmp_path: Path) -> None:
    model = base_model(save_tiny(tmp_path))
    with pytest.raises(ModelError, match=said):
        add_lora(model, lora, seed=0)
    with pytest.raises(ModelError, match=said):
        check_lora(model.config, lora)


def test_what_a_start_looks_at_has_no_weights_and_takes_nothing_for_a_mistake() -> None:
    for name in ("gpt_oss", "gemma3", "llama4"):
        check_lora(zoo.tiny(name), LoraConfig(experts=name != "gemma3"))
    with pytest.raises(ModelError, match="no stacked experts"):
        check_lora(zoo.tiny("gemma3"), LoraConfig(experts=True))
    with pytest.raises(ModelError, match="no layer of the model is called 'gate_proj'"):
        check_lora(zoo.tiny("olmoe"), LoraConfig(targets=["gate_proj"]))


MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "glm4_moe",
    "deepseek_v3",
    "olmoe",
    "phimoe",
    "granitemoe",
    "ernie4_5_moe",
)


def mixture(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(zoo.tiny(family), dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("experts", [False, True], ids=["without experts", "experts"])
@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_of_mixtures_are_plain_pefts(family: str, experts: bool, tmp_path: Path) -> None:
    """Plain PEFT loads what was trained, and merges it; routers stay as they are, experts unless they are asked for."""
    path = mixture(tmp_path / "base", family)
    model = add_lora(base_model(path), LoraConfig(r=4, experts=experts), seed=3).eval()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".experts." in name for name in trained) == experts
    assert not any("router" in name or ".gate." in name for name in trained)
    train_a_little(model)
    save_adapter(model, gather_adapter_state(model), tmp_path / "run")
    again = peft.PeftModel.from_pretrained(base_model(path), tmp_path / "run").eval()
    expected = model(TOKENS).logits
    assert torch.equal(again(TOKENS).logits, expected)
    assert torch.equal(load_adapter(base_model(path), tmp_path / "run").eval()(TOKENS).logits, expected)
    assert (base_model(path).eval()(TOKENS).logits - expected).abs().max() > 0.1
    assert torch.allclose(again.merge_and_unload()(TOKENS).logits, expected, atol=1e-3)


def test_all_linears_of_a_mixture_are_adapted(tmp_path: Path) -> None:
    """The first layer's MLP and the shared experts too, which PEFT's own all-linear leaves out."""
    model = add_lora(base_model(mixture(tmp_path, "glm4_moe")), LoraConfig(r=4), seed=0)
    adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    linears = {name for name, m in base_model(tmp_path).named_modules() if type(m) is torch.nn.Linear}
    assert adapted == linears - {"lm_head"}
    assert "not on the 4 experts of a layer (lora.experts: true" in adapted_in_words(model)
    asked = add_lora(base_model(tmp_path), LoraConfig(r=4, targets=["q_proj"], experts=True), seed=0)
    assert adapted_in_words(asked).startswith(
        "adapters on q_proj, and on down_proj, gate_up_proj of each of a layer's 4"
    )


def test_experts_of_a_dense_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lora\.experts is true, but llama has no stacked experts"):
        add_lora(base_model(save_tiny(tmp_path)), LoraConfig(experts=True), seed=0)


def test_what_peft_refuses_is_a_mistake_of_the_config(tmp_path: Path) -> None:
    """DoRA on shared experts, which PEFT takes by their weights."""
    model = base_model(mixture(tmp_path, "glm4_moe"))
    with pytest.raises(ModelError, match=r"PEFT cannot adapt this glm4_moe so: .*Change lora\.targets.*lora\.dora"):
        add_lora(model, LoraConfig(dora=True), seed=0)


@pytest.mark.parametrize(
    "lora", [LoraConfig(r=4), LoraConfig(r=4, dora=True), LoraConfig(r=4, modules_to_save=["lm_head"])]
)
def test_going_on_from_an_adapter_starts_where_it_ended(lora: LoraConfig, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")
    model = add_lora(base_model(path), lora, seed=3)
    train_a_little(model)
    save_adapter(model, gather_adapter_state(model), tmp_path / "run")
    again = add_lora(base_model(path), lora.model_copy(update={"init_from": str(tmp_path / "run")}), seed=4)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 8}, "made with other keys: set lora.r: 4"),
        ({"alpha": 7, "rslora": True}, "set lora.alpha: 32.*, lora.rslora: False"),
        ({"targets": ["q_proj"]}, "adapts other layers"),
        ({"targets": ["q_proj", "v_proj", "lm_head"]}, "adapts other layers"),
        ({"init_from": "nowhere"}, "holds no adapter_config.json"),
    ],
)
def test_an_adapter_of_other_keys_is_not_gone_on_from(change: dict, said: str, tmp_path: Path) -> None:
    path, lora = save_tiny(tmp_path / "base"), LoraConfig(r=4, targets=["q_proj", "v_proj"])
    model = add_lora(base_model(path), lora, seed=3)
    save_adapter(model, gather_adapter_state(model), tmp_path / "run")
    with pytest.raises(ModelError, match=said):
        add_lora(base_model(path), lora.model_copy(update={"init_from": str(tmp_path / "run"), **change}), seed=4)


def test_an_adapter_of_a_stretched_model_needs_the_same_stretch(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base")
    model = add_lora(base_model(path), LoraConfig(r=4), seed=3)
    model.get_base_model().config.rope_parameters["rope_theta"] = 1e6
    save_adapter(model, gather_adapter_state(model), tmp_path / "run")
    with pytest.raises(ModelError, match=r"trained with RoPE.*set model\.rope"):
        add_lora(base_model(path), LoraConfig(r=4, init_from=str(tmp_path / "run")), seed=4)


def test_a_width_of_as_many_features_as_experts_is_no_router() -> None:
    """Qwen3-Next-80B has 512 experts, and 512 features of keys."""
    config = zoo.tiny("qwen3_next")
    keys = config.num_key_value_heads * config.head_dim
    config.num_experts = keys
    model = add_lora(AutoModelForCausalLM.from_config(config), LoraConfig(r=2), seed=0)
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {"q_proj", "k_proj", "v_proj"} <= adapted
    assert "gate" not in adapted


def test_a_named_layer_that_cannot_be_adapted_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(zoo.tiny("falcon_h1"))
    with pytest.raises(ModelError, match=r"lora.targets names out_proj"):
        add_lora(model, LoraConfig(r=2, targets=["q_proj", "out_proj"]), seed=0)
