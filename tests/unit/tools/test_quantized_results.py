"""An adapter trained on a quantised base belongs to that base: exported into it, asked on it, never on the 16-bit one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ds_longft.config.read import dump_config
from ds_longft.config.run_config import LoraConfig, RunConfig
from ds_longft.errors import ModelError
from ds_longft.model.load import load_config, load_model
from ds_longft.model.load_packed import packable
from ds_longft.model.lora import add_lora, gather_adapter_state, save_adapter
from ds_longft.tools.evaluate.subject import find_subject, load_subject
from ds_longft.tools.export import export_model
from tests.unit.model.test_packed import load, save_fp8
from tests.unit.model.tiny import WINDOW, save_tiny

CPU = torch.device("cpu")
TOKENS = torch.arange(1, 20)[None]


def make_run(folder: Path, base: Path, quantize_as: str) -> tuple[Path, torch.Tensor]:
    """A run's output folder, and its model's logits."""
    config = RunConfig.model_validate({"model": {"path": str(base), "quantize": quantize_as}, "lora": {"r": 4}})
    hf_config = load_config(config.model, WINDOW, attn_implementation="eager")
    packed = load_model(config.model, hf_config, ds_engine_config=None, dtype=torch.float32, device=CPU)
    model = add_lora(packed, LoraConfig(r=4), seed=0)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    save_adapter(model, gather_adapter_state(model), folder)
    (folder / "config.yaml").write_text(dump_config(config))
    with torch.no_grad():
        return folder, model.eval()(TOKENS).logits


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "dense", "qwen3", hidden_size=128, intermediate_size=256, head_dim=32)


def stored_fp8(folder: Path) -> Path:
    """The same weights in a folder whose files are quantised."""
    path = save_tiny(folder, "qwen3", hidden_size=128, intermediate_size=256, head_dim=32)
    save_fp8(path, {full for full, _, _ in packable(load(path))})
    return path


@pytest.mark.parametrize("form", ["nf4", "int8", "stored fp8"])
def test_it_is_merged_into_the_base_it_was_trained_on(form: str, dense: Path, tmp_path: Path) -> None:
    base = stored_fp8(tmp_path / "stored") if form == "stored fp8" else dense
    run, truth = make_run(tmp_path / "run", base, "auto" if form == "stored fp8" else form)
    report = export_model(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert form.rsplit(maxsplit=1)[-1] in report["merged_into"]
    assert getattr(model.config, "quantization_config", None) is None
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, truth, rtol=1e-4, atol=1e-4)


def test_it_is_not_merged_into_the_base_as_it_was_before(dense: Path, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", stored_fp8(tmp_path / "stored"), "auto")
    with pytest.raises(ModelError, match="trained on a checkpoint that is quantised"):
        export_model(run, tmp_path / "out", base=str(dense))


@pytest.mark.parametrize("form", ["nf4", "stored fp8"])
def test_it_is_merged_into_the_unquantised_base_where_that_is_asked_for(form: str, dense: Path, tmp_path: Path) -> None:
    stored = form == "stored fp8"
    run, trained = make_run(
        tmp_path / "run", stored_fp8(tmp_path / "stored") if stored else dense, "auto" if stored else form
    )
    report = export_model(run, tmp_path / "out", base=str(dense) if stored else None, into="original")
    assert f"another model than the one trained, which was on {form.rsplit(maxsplit=1)[-1]}" in report["merged_into"]
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), str(run)).eval()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        merged = model(TOKENS).logits
        torch.testing.assert_close(merged, original(TOKENS).logits, rtol=1e-4, atol=1e-4)
        assert (merged - trained).abs().max() > 1e-2


def test_there_has_to_be_an_unquantised_base_to_merge_into(dense: Path, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "stored_run", stored_fp8(tmp_path / "stored"), "auto")
    with pytest.raises(ModelError, match="give the unquantised checkpoint as --base"):
        export_model(run, tmp_path / "out", into="original")
    run, _ = make_run(tmp_path / "dense_run", dense, "auto")
    with pytest.raises(ModelError, match="was trained on the unquantised base"):
        export_model(run, tmp_path / "out", into="original")


@pytest.mark.parametrize("form", ["nf4", "stored fp8"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_it_is_asked_on_the_base_it_was_trained_on(form: str, checkpoint: bool, dense: Path, tmp_path: Path) -> None:
    base = stored_fp8(tmp_path / "stored") if form == "stored fp8" else dense
    folder = tmp_path / "run" / "checkpoint-4" if checkpoint else tmp_path / "run"
    run, truth = make_run(folder, base, "auto" if form == "stored fp8" else form)
    if checkpoint:
        (run / "config.yaml").rename(run.parent / "config.yaml")
    loaded = load_subject(find_subject(str(run)), CPU, attention="eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(TOKENS).logits, truth, rtol=1e-5, atol=1e-5)
