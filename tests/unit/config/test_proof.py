from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_longft.config.preflight import check_run
from ds_longft.config.proof import proof_problem, proofs, why_not_proved
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError


@pytest.mark.parametrize(
    ("model_type", "text_type", "proved"),
    [
        ("llama", "llama", True),
        ("gemma3", "gemma3_text", True),
        ("internvl", "qwen3", True),  # another text model than it was walked with, proved alone
        ("internvl", "bloom", False),
        ("bloom", "bloom", False),
        ("their_own", "their_own", False),
    ],
)
def test_what_is_proved(model_type: str, text_type: str, proved: bool) -> None:
    assert (proof_problem(model_type, text_type) is None) == proved


def test_each_type_is_one_of_four_things_and_says_why() -> None:
    for name, entry in proofs()["types"].items():
        assert len({"proved", "refused", "unknown", "wrong"} & set(entry)) == 1, name
        why = why_not_proved(name)
        assert (why is None) == ("proved" in entry)
        assert why is None or (20 < len(why) < 400 and "\n" not in why), name
    assert sum("proved" in entry for entry in proofs()["types"].values()) >= 100


def test_what_is_refused_says_why_at_once() -> None:
    said = str(proof_problem("bloom", "bloom"))
    assert "does not use transformers' attention interface" in said
    assert "unproved" not in said  # it would not help


@pytest.mark.parametrize("unproved", [False, True])
def test_a_type_that_nobody_compared_is_refused_unless_asked_for(tmp_path: Path, unproved: bool) -> None:
    model_config: dict[str, Any] = {"model_type": "their_own", "num_attention_heads": 4, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(model_config))
    config = RunConfig.model_validate(
        {
            "model": {"path": str(tmp_path), "random_weights": True, "unproved": unproved},
            "data": {"train": ["absent.jsonl"], "max_length_tokens": 64},
        }
    )
    with pytest.raises(ConfigError) as caught:
        check_run(config, world=1, local_world=1, ds=None, model_config=model_config)
    assert any("model.unproved" in problem for problem in caught.value.problems) != unproved
