"""What others read of a result: the card of a run, and of what is exported from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ds_longft.config.run_config import RunConfig
from ds_longft.layout import ParallelLayout
from ds_longft.train.card import copy_card, write_card
from ds_longft.train.hub import for_others, hub_id, named_elsewhere

CACHED = "/home/me/hub/models--Qwen--Qwen3-8B/snapshots/0123abc"


@pytest.mark.parametrize(
    ("base", "on_hub", "name"),
    [("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), (CACHED, "Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("/models/mine", None, "mine")],
)  # fmt: skip
def test_a_base_is_named_as_others_know_it(base: str, on_hub: str | None, name: str) -> None:
    assert (hub_id(base), named_elsewhere(base)) == (on_hub, name)


def card(folder: Path, base: Path) -> tuple[dict[str, object], str]:
    folder.mkdir(exist_ok=True)
    config = RunConfig.model_validate({"model": {"path": str(base)}, "data": {"train": ["a.jsonl"]}})
    write_card(folder, config, ParallelLayout(world=1, sp=1, rank=0), [])
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_no_folder_of_this_machine_is_a_base_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    front, text = card(tmp_path / "run", base)
    assert "base_model" not in front, "a hub refuses it"
    assert "| base model | base |" in text
    assert f"from_pretrained({str(base)!r})" in text, "here it is loaded from there"
    assert str(tmp_path) not in for_others(text, str(base)).replace(str(tmp_path / "run"), "")
    cached = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert card(tmp_path / "run", cached)[0]["base_model"] == "Qwen/Qwen3-8B"


def test_an_exported_model_has_a_card_that_loads_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    card(tmp_path / "run", tmp_path / "base")
    copy_card(tmp_path / "run", tmp_path / "out", Path("/models/merged"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"
    assert "AutoModelForCausalLM.from_pretrained('/models/merged')" in text
    assert "Peft" not in text
