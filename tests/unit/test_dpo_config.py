"""Keys of preference training that contradict each other, or would do nothing, are named before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_longft.check import check_run
from ds_longft.config import RunConfig
from ds_longft.ds_config import DeepSpeedSettings
from ds_longft.errors import ConfigError

DPO: dict[str, Any] = {"objective": "dpo"}


def problems(content: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="Value error") as error:
        RunConfig.model_validate(content)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"dpo": {"beta": 0.2}}, "dpo has keys, but objective is sft"),
        ({"data": {"train": [{"path": "a", "format": "preference"}]}}, "set objective to dpo"),
        ({**DPO, "data": {"train": [{"path": "a", "format": "messages"}]}}, "a has format messages"),
        ({**DPO, "data": {"weighting": "sample"}}, "data.weighting is sample"),
        ({**DPO, "data": {"overlong": "cut_turns"}}, "data.overlong is cut_turns"),
        ({**DPO, "lora": {"init_from": "runs/sft"}}, "lora.init_from is given"),
        ({**DPO, "lora": {"dropout": 0.1}}, "lora.dropout is 0.1"),
        ({**DPO, "dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "dpo.label_smoothing is 0.1"),
        ({**DPO, "dpo": {"simpo_gamma": 1.0}}, "dpo.simpo_gamma is 1, but dpo.loss is sigmoid"),
        ({**DPO, "dpo": {"loss": "simpo", "reference": "model"}}, "dpo.loss simpo has no reference"),
        ({**DPO, "lora": None, "dpo": {"reference": "adapter_off"}}, "dpo.reference is adapter_off, but lora is null"),
        ({**DPO, "dpo": {"reference": "model"}}, "dpo.reference is model, but lora is on"),
    ],
)
def test_contradictions(content: dict[str, Any], words: str) -> None:
    assert words in problems(content)


def test_all_at_once() -> None:
    text = problems({**DPO, "lora": {"dropout": 0.1}, "data": {"weighting": "sample"}})
    assert "lora.dropout" in text
    assert "data.weighting" in text


def test_a_pack_holds_a_pair() -> None:
    assert RunConfig.model_validate({**DPO, "data": {"max_length_tokens": "64K"}}).budget_tokens == 131072
    assert (
        RunConfig.model_validate({**DPO, "data": {"max_length_tokens": "8K", "pack_tokens": "64K"}}).budget_tokens
        == 65536
    )
    assert RunConfig.model_validate({"data": {"max_length_tokens": "64K"}}).budget_tokens == 65536


@pytest.mark.parametrize("own", [True, False])
def test_precomputed_needs_a_rope_that_does_not_look_at_the_pack(tmp_path: Path, own: bool) -> None:
    """Its frequencies would be those of another pack than the one trained."""
    model = {"model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 4096}
    stretched = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}} if own else {}
    (tmp_path / "config.json").write_text(json.dumps(model | stretched))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    rope = {} if own else {"rope": {"type": "dynamic", "factor": 4.0}}
    config = RunConfig.model_validate(
        {
            **DPO,
            "output_dir": str(tmp_path / "out"),
            "model": {"path": str(tmp_path), **rope},
            "data": {"train": [str(tmp_path / "rows.jsonl")], "max_length_tokens": 8192},
            "dpo": {"reference": "precomputed"},
        }
    )
    with pytest.raises(ConfigError, match=r"dpo.reference is precomputed, but RoPE of type dynamic"):
        check_run(
            config,
            world=1,
            local_world=1,
            ds=DeepSpeedSettings(engine={}, sp=None, stage=3),
            model_config=model | stretched,
        )
