"""The text model of a multimodal checkpoint: loaded without the towers, saved so that the wrapper takes it back."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoTokenizer

from ds_longft.config.run_config import LoraConfig, ModelConfig
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load import load_config, load_model
from ds_longft.model.lora import add_lora, gather_adapter_state, load_adapter, save_adapter
from ds_longft.model.supported import decoder_layers
from ds_longft.model.wrapped import make, save_whole, text_class, whole_class
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.tools.export import export_model
from ds_longft.train.weights import gather_weights
from tests.unit.sequence.zoo import tiny
from tests.unit.tools.test_export import save_tokenizer

OTHERS = ("llama4", "mistral3", "qwen3_vl", "internvl", "llava", "llava_next", "smolvlm")
WRAPPERS = ["gemma3", "gemma4", "qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
TOKENS = torch.arange(1, 20)[None]


def save_wrapper(folder: Path, model_type: str) -> Path:
    """A whole multimodal checkpoint with random weights, a processor's file and a tokenizer."""
    torch.manual_seed(0)
    config = tiny(model_type)
    make(whole_class(config), config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 32}')
    save_tokenizer(folder)
    return folder


def text_model(base: Path) -> Any:
    source = ModelConfig(path=str(base))
    config = load_config(source, 32, attn_implementation="eager")
    return load_model(source, config, ds_engine_config=None, dtype=torch.float32, device=torch.device("cpu"))


def disturbed(model: Any) -> Any:
    """With other trained weights than it was loaded with."""
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def towers(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a saved model that are none of its text model's."""
    return {k: v for k, v in load_file(folder / "model.safetensors").items() if re.search("vis|projector|newline", k)}


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_towers_are_not_in_it(tmp_path: Path, model_type: str) -> None:
    base = save_wrapper(tmp_path / "base", model_type)
    model = text_model(base)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    assert {id(p) for p in model.parameters()} == {id(p) for part in (decoder, head) for p in part.parameters()}
    facts = ModelFacts.from_config(model.config)
    assert facts.weights == sum(p.numel() for p in model.parameters())
    assert facts.layers == len(decoder.layers)
    with torch.no_grad():
        ours = head(decoder(input_ids=TOKENS).last_hidden_state)
        whole = AutoModelForImageTextToText.from_pretrained(base, attn_implementation="eager").eval()
        torch.testing.assert_close(whole(input_ids=TOKENS).logits, ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", sorted({"deepseek_vl_hybrid", "nemotron_h_omni"} & {*CONFIG_MAPPING}))
def test_towers_attend_as_they_know_and_the_decoder_is_found(model_type: str) -> None:
    register()
    config = tiny(model_type)
    with torch.device("meta"):
        model = make(text_class(config), config, attn_implementation=ULYSSES)
    assert len(decoder_layers(model)) == config.get_text_config().num_hidden_layers
    assert model.get_decoder().config._attn_implementation == ULYSSES
    assert model.get_output_embeddings().out_features == config.get_text_config().vocab_size


def test_the_forward_of_llama_4s_wrapper_is_mended() -> None:
    model = make(whole_class(tiny("llama4")), tiny("llama4")).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, model.language_model(input_ids=TOKENS).logits)


@pytest.mark.parametrize("model_type", ["glm4v_moe", "qwen3_omni_moe_thinker"])
def test_adapters_of_a_mixture_leave_layers_of_the_same_names_in_towers_alone(model_type: str) -> None:
    """Of both PEFT knows the type, and makes plain names of the pattern it is given."""
    config, names = tiny(model_type), []
    whole = make(whole_class(config), copy.deepcopy(config))
    path = next(name for name, module in whole.named_modules() if module is whole.get_decoder())
    for model_class in (whole_class(config), text_class(config)):
        adapted = add_lora(make(model_class, copy.deepcopy(config)), LoraConfig(r=4, alpha=8), seed=0)
        names.append({name for name, _ in adapted.named_parameters() if "lora_" in name})
    assert names[0] == names[1]
    assert all(name.startswith(f"base_model.model.{path}.") for name in names[0])


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_an_adapter_fits_the_wrapper(tmp_path: Path, model_type: str, targets: Any) -> None:
    """Loaded by plain PEFT on the whole model, and exported into it."""
    base, run = save_wrapper(tmp_path / "base", model_type), tmp_path / "run"
    if "lm_head" in targets and AutoModelForImageTextToText.from_pretrained(base).config.tie_word_embeddings:
        targets = ["q_proj"]
    model = disturbed(add_lora(text_model(base), LoraConfig(r=4, targets=targets), seed=0))
    state = gather_adapter_state(model)
    save_adapter(model, state, run)
    save_tokenizer(run)
    truth = model(input_ids=TOKENS).logits.detach()

    whole = AutoModelForImageTextToText.from_pretrained(base).eval()
    loaded = peft.PeftModel.from_pretrained(whole, run).eval()
    names = {name.replace(".default", "") for name, _ in loaded.named_parameters() if "lora_" in name}
    assert names == set(state)  # none in the towers
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, truth, rtol=1e-5, atol=1e-5)
    load_adapter(text_model(base), run)

    report = export_model(run, tmp_path / "out")
    assert report["reload_logits_max_difference"] < 1e-5
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, truth, rtol=1e-4, atol=1e-4)
    before, after = towers(base), towers(tmp_path / "out")
    assert before
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out/preprocessor_config.json").read_text()) == {"size": 32}
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_all_weights_go_back_into_the_wrapper(tmp_path: Path, model_type: str) -> None:
    base, run = save_wrapper(tmp_path / "base", model_type), tmp_path / "run"
    model = disturbed(text_model(base))
    save_whole(model, gather_weights(model), run)
    save_tokenizer(run)
    truth = model(input_ids=TOKENS).logits.detach()
    export_model(run, tmp_path / "out")
    for folder in (run, tmp_path / "out"):
        again = AutoModelForImageTextToText.from_pretrained(folder).eval()
        torch.testing.assert_close(again(input_ids=TOKENS).logits, truth, rtol=1e-5, atol=1e-5)
        before, after = towers(base), towers(folder)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert (folder / "preprocessor_config.json").is_file()
