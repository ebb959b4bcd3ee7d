"""Layers with a state are all found, or the model is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_longft.config.state_families import STATE_FAMILIES
from ds_longft.errors import ModelError
from ds_longft.sequence.state.families import MIXERS, spread_state_layers, state_layers

SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "pad_token_id": None}
HYBRID = {"qwen3_next": 3, "qwen3_5_text": 3, "olmo_hybrid": 3, "bamba": 4, "falcon_h1": 4, "minimax": 2}


@pytest.mark.parametrize("name", HYBRID)
def test_a_class_under_another_name_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A newer transformers may rename one: its states would silently end at each rank's own tokens."""
    assert name in STATE_FAMILIES
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL))
    mixers = {type(mixer).__name__ for _, mixer in state_layers(model)}
    assert len(list(state_layers(model))) == HYBRID[name]
    for known in mixers:
        monkeypatch.delitem(MIXERS, known)
    with pytest.raises(ModelError, match=f"0 of {HYBRID[name]} layers with a state"):
        spread_state_layers(model)
    monkeypatch.undo()
    assert spread_state_layers(model) == HYBRID[name]
