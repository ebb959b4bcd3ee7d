from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV4Config,
    MambaConfig,
    PretrainedConfig,
    Qwen3NextConfig,
    RwkvConfig,
    T5Config,
    Zamba2Config,
)

from ds_longft.config.model_keys import RopeConfig
from ds_longft.config.run_config import ModelConfig
from ds_longft.errors import ModelError
from ds_longft.model.load import config_remarks, load_config, load_model
from ds_longft.model.read_model import load_tokenizer, read_config
from tests.tokenizer import tiny_tokenizer
from tests.unit.model.tiny import FAMILIES, WINDOW, save_tiny, tiny_config

CPU = torch.device("cpu")


def load(model: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0):
    config = load_config(model, WINDOW, attn_implementation="eager")
    return load_model(model, config, ds_engine_config=None, dtype=dtype, device=CPU, seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_as_saved(family: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path, family)
    model = load(ModelConfig(path=str(path)))
    tokens = torch.arange(1, 40)[None]
    truth = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()(tokens).logits
    assert torch.equal(model.eval()(tokens).logits, truth)
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"
    assert model.config.name_or_path == str(path)
    model.save_pretrained(tmp_path / "again")
    saved, original = load_file(tmp_path / "again/model.safetensors"), load_file(path / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[k], original[k]) for k in original)


def test_random_weights_need_no_weights_and_follow_the_seed(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    rehearsal = ModelConfig(path=str(tmp_path), random_weights=True)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = load(rehearsal, torch.bfloat16, seed=1)
    assert torch.equal(torch.get_rng_state(), before), "the process's own random state moved"
    second, other = load(rehearsal, torch.bfloat16, seed=1), load(rehearsal, torch.bfloat16, seed=2)
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert first.model.rotary_emb.inv_freq.dtype == torch.float32
    assert first.training
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match=r"no \.safetensors file, only pytorch_model\.bin.*never read"):
        load(ModelConfig(path=str(tmp_path)))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights.*layers\.1\.mlp\.up_proj"):
        load(ModelConfig(path=str(path)))


def test_truncated_weights_are_one_clear_error(tmp_path: Path) -> None:
    path = save_tiny(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(ModelConfig(path=str(path)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (T5Config(), "t5 is an encoder-decoder"),
        (Zamba2Config(), "zamba2"),
        (MambaConfig(num_hidden_layers=2), "mamba"),
        (RwkvConfig(num_hidden_layers=2), "rwkv"),
        (DeepseekV4Config(), "deepseek_v4 has layers of type .*compressed"),
        (BloomConfig(), "bloom .*attention interface"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_models_that_cannot_be_split_exactly_are_refused_by_name(
    config: PretrainedConfig, named: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=named):
        load_config(ModelConfig(path=str(tmp_path), random_weights=True), 32, attn_implementation="sdpa")


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.path is not set"):
        load_config(ModelConfig(), 32, attn_implementation="sdpa")
    with pytest.raises(ModelError, match="there is no folder"):
        load_config(ModelConfig(path=str(tmp_path / "absent")), 32, attn_implementation="sdpa")
    with pytest.raises(ModelError, match="no model config can be read"):
        load_config(ModelConfig(path=str(tmp_path)), 32, attn_implementation="sdpa")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(ModelError, match="no model config can be read"):
        load_config(ModelConfig(path=str(tmp_path)), 32, attn_implementation="sdpa")
    with pytest.raises(ModelError, match="no tokenizer can be read"):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_remote_code_needs_a_pinned_revision(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"pinned to a full commit hash"):
        load_config(ModelConfig(path=str(tmp_path), trust_remote_code=True), 32, attn_implementation="sdpa")


def test_a_loss_that_the_config_asks_for_and_is_left_out_is_named(tmp_path: Path) -> None:
    tiny_config("qwen3_moe", output_router_logits=True).save_pretrained(tmp_path)
    [remark] = config_remarks(read_config(ModelConfig(path=str(tmp_path))), RopeConfig(), WINDOW)
    assert "output_router_logits: true" in remark
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    assert config_remarks(read_config(ModelConfig(path=str(tmp_path))), RopeConfig(), WINDOW) == []


def test_a_stretch_is_of_the_layers_with_positions_alone(tmp_path: Path) -> None:
    Qwen3NextConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    config = read_config(ModelConfig(path=str(tmp_path)))
    [remark] = config_remarks(config, RopeConfig(type="yarn"), WINDOW)
    assert "softmax attention layers alone" in remark
    assert config_remarks(config, RopeConfig(), WINDOW) == []


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_processors_template_where_the_tokenizer_has_none(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    own, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(json.dumps({"chat_template": own}))
    assert load_tokenizer(ModelConfig(path=str(tmp_path))).chat_template == own
    tokenizer.chat_template = "its own"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path))).chat_template == "its own"
    (tmp_path / name).unlink()
    tokenizer.chat_template = None
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(path=str(tmp_path))).chat_template is None


def test_a_folder_with_tokenizer_model_alone(tmp_path):
    """Older Llamas, Mistrals and Yi."""
    import sentencepiece

    texts = iter([Path(json.__file__).read_text(), "Hello the world"])
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("Hello the world", "return the object 世界"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").is_file()
