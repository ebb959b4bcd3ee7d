from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ds_longft.config.model_keys import RopeConfig
from ds_longft.config.run_config import LoraConfig, ModelConfig
from ds_longft.errors import ModelError
from ds_longft.model.load import load_config, load_model
from ds_longft.model.lora import add_lora, gather_adapter_state, save_adapter
from ds_longft.model.wrapped import PREPARATION_FILES
from ds_longft.tools.export import export, export_model
from ds_longft.train.hub import files_of
from tests.unit.model.tiny import SHAPE, WINDOW, save_tiny

NO_STRETCH = RopeConfig()
EXPERTS = ("qwen3_moe", "mixtral", "glm4_moe", "gpt_oss")
"""Mixtures of experts, whose files hold them one by one (but for gpt_oss)."""

TOKENS = torch.arange(1, 20)[None]
TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


def save_tokenizer(folder: Path) -> None:
    words = {"[UNK]": 0, "The": 1, "capital": 2, "of": 3, "France": 4, "is": 5}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), unk_token="[UNK]")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_run(
    folder: Path,
    lora: LoraConfig,
    rope: RopeConfig = NO_STRETCH,
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> Path:
    """A run's output folder, trained in float32 whatever the base's type is."""
    base_folder = save_tiny(folder / "base", dtype=dtype, **changes)
    source = ModelConfig(path=str(base_folder), rope=rope)
    length = WINDOW if rope.type == "none" else 4 * WINDOW
    config = load_config(source, length, attn_implementation="eager")
    base = load_model(source, config, ds_engine_config=None, dtype=torch.float32, device=torch.device("cpu"))
    model = add_lora(base, lora, seed=0)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    run = folder / "run"
    save_adapter(model, gather_adapter_state(model), run)
    save_tokenizer(run)
    torch.save({"logits": model.eval()(TOKENS).logits.detach()}, folder / "truth.pt")
    return run


@pytest.mark.parametrize(
    ("lora", "changes"),
    [
        (LoraConfig(r=4), {}),
        (LoraConfig(r=4, dora=True, rslora=True), {}),
        (LoraConfig(r=4), {"tie_word_embeddings": True}),
        (LoraConfig(r=4, modules_to_save=["embed_tokens"]), {"tie_word_embeddings": True}),
        (LoraConfig(r=4, modules_to_save=["embed_tokens", "lm_head"]), {}),
        (LoraConfig(r=4, targets=["q_proj", "lm_head"]), {"tie_word_embeddings": True}),
        *((LoraConfig(r=4), {"family": family}) for family in EXPERTS),
    ],
    ids=["plain", "dora", "tied", "tied and saved", "untied and saved", "tied and adapted", *EXPERTS],
)
def test_merged_folder_gives_the_adapters_logits(lora: LoraConfig, changes: dict, tmp_path: Path) -> None:
    run = make_run(tmp_path, lora, **changes)
    report = export_model(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    truth = torch.load(tmp_path / "truth.pt", weights_only=True)["logits"]
    torch.testing.assert_close(model(TOKENS).logits, truth, rtol=1e-4, atol=1e-4)
    assert report["merged_logits_max_difference"] < 1e-4
    assert report["reload_logits_max_difference"] < 1e-5  # equal weights at another alignment in memory
    assert report["weights_bit_equal_after_reload"] == len(load_file(tmp_path / "out/model.safetensors"))
    assert model.config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    assert (tmp_path / "out/generation_config.json").is_file()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_rope_change_is_in_the_exported_config(tmp_path: Path) -> None:
    run = make_run(tmp_path, LoraConfig(r=4), RopeConfig(type="yarn"))
    report = export_model(run, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.max_position_embeddings == 4 * WINDOW
    assert report["rope"] == {"all": "yarn"}
    truth = torch.load(tmp_path / "truth.pt", weights_only=True)["logits"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(model(TOKENS).logits, truth, rtol=1e-4, atol=1e-4)


def test_export_keeps_the_bases_dtype_and_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, LoraConfig(r=4), dtype=torch.bfloat16)
    export(str(run), str(tmp_path / "out"), json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    export(str(run), str(tmp_path / "second"))
    assert "merged logits max difference" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", *EXPERTS])
def test_a_full_run_is_copied_without_its_checkpoints(tmp_path: Path, family: str) -> None:
    run = save_tiny(tmp_path / "run", family)
    save_tokenizer(run)
    (run / "checkpoint-3").mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    report = export_model(run, tmp_path / "out")
    assert report["kind"] == "full model"
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert not (tmp_path / "out/checkpoint-3").exists()
    assert not (tmp_path / "out/metrics.jsonl").exists()
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_prediction_heads_that_transformers_leaves_out_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention"]
    config = AutoConfig.for_model(
        "qwen3_5_text", **SHAPE, layer_types=kinds, linear_num_key_heads=2, linear_num_value_heads=4
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    heads = {"mtp.fc.weight": torch.randn(4, 4), "mtp.norm.weight": torch.randn(4).bfloat16()}
    save_file({**load_file(folder / "model.safetensors"), **heads}, folder / "model.safetensors", {"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = add_lora(base, LoraConfig(r=4), seed=0)
    save_adapter(model, gather_adapter_state(model), tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: t for name, t in written.items() if name.startswith("mtp.")}.keys() == heads.keys()
    assert all(torch.equal(written[name], t) and written[name].dtype == t.dtype for name, t in heads.items())


def test_damage_and_absence_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, LoraConfig(r=4))
    with pytest.raises(ModelError, match="exists already"):
        export_model(run, run)
    with pytest.raises(ModelError, match=r"holds no result.*output_dir"):
        export_model(tmp_path, tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"base model .* cannot be loaded.*--base"):
        export_model(run, tmp_path / "out")
    export_model(run, tmp_path / "out", base=str(tmp_path / "moved"))

    adapter = load_file(run / "adapter_model.safetensors")
    adapter[next(iter(adapter))].fill_(float("nan"))
    save_file(adapter, run / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be merged: NaN"):
        export_model(run, tmp_path / "broken", base=str(tmp_path / "moved"))
    assert not (tmp_path / "broken").exists()


def test_weights_that_come_back_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts too, though the model holds them in one tensor."""
    run = save_tiny(tmp_path / "run", "qwen3_moe")
    save_tokenizer(run)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"

    def written_otherwise(folder: Path):
        for key, tensor in load_file(folder / "model.safetensors").items():
            yield key, tensor + 1 if key == name else tensor

    monkeypatch.setattr("ds_longft.tools.export._tensors_in", written_otherwise)
    with pytest.raises(ModelError, match=rf"weight {name} of .* does not come back"):
        export_model(run, tmp_path / "out")


def test_an_adapter_that_does_not_load_whole_is_refused(tmp_path: Path) -> None:
    """PEFT warns, and what is missing stays as it was initialised."""
    run = make_run(tmp_path, LoraConfig(r=4))
    adapter = load_file(run / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.mlp", "layers.1.feed_forward"): tensor for name, tensor in adapter.items()}
    save_file(renamed, run / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not load whole: 6 of its 28 tensors do not arrive in llama"):
        export_model(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_with_code_of_its_own_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask at the terminal, and wait."""
    run = make_run(tmp_path, LoraConfig(r=4))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    path = tmp_path / "base" / "config.json"
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": own}))
    (tmp_path / "base" / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match=r"base model .* cannot be loaded"):
        export_model(run, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_a_base_that_had_grown(tied: bool, tmp_path: Path) -> None:
    """Made elsewhere: two tokens added, the embeddings saved with the adapter."""
    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    export_model(tmp_path / "adapter", tmp_path / "out", str(base))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, adapted.eval()(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_what_prepares_images_is_uploaded_too(tmp_path: Path) -> None:
    for name in (*PREPARATION_FILES, "optimizer.pt", "config.yaml"):
        (tmp_path / name).touch()
    assert set(files_of(tmp_path)) == set(PREPARATION_FILES)
