"""Keys of preference training that contradict each other, or would do nothing, are named before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from ds_longft.config.run_config import RunConfig

DPO: dict[str, Any] = {"objective": "dpo"}


def problems(content: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="Value error") as error:
        RunConfig.model_validate(content)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"dpo": {"beta": 0.2}}, "dpo has keys, but objective is sft"),
        ({"dpo": {"beta": 0.1}}, "add the line `objective: dpo`"),
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


def test_a_whole_config_of_supervised_training_is_read_again() -> None:
    """It names every key with its default, those of dpo too."""
    whole = RunConfig().model_dump(mode="json")
    assert RunConfig.model_validate(whole) == RunConfig()


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
