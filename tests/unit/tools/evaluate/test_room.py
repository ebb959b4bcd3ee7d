"""Where an evaluation's weights lie, told by sizes alone."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from ds_longft.errors import ConfigError
from ds_longft.model.facts import ModelFacts
from ds_longft.tools.evaluate.flags import Flags, Ranks
from ds_longft.tools.evaluate.room import Asked, Room

LLAMA8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256,
}  # fmt: skip
LLAMA70B = {
    **LLAMA8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LONG = Asked(131072, 1, 40)


def room(
    shape: dict[str, Any], *, sp: int = 1, world: int | None = None, quantize: str = "", gib: float = 139.8
) -> Room:
    config = AutoConfig.for_model("llama", **shape)
    return Room(ModelFacts.from_config(config), config, sp, world or sp, quantize, gib, host_gib=200)


def test_the_first_place_that_leaves_room() -> None:
    assert room(LLAMA8B).place(LONG, "auto") == "resident"
    assert room(LLAMA70B).place(LONG, "auto") == "host"  # 131 GiB of weights
    assert room(LLAMA70B, sp=2).place(LONG, "auto") == "sharded"
    assert room(LLAMA70B, sp=2, world=4).place(LONG, "auto") == "host"  # two texts at a time share no layers
    assert room(LLAMA70B, quantize="nf4").place(LONG, "auto") == "resident"
    assert room(LLAMA70B, quantize="nf4").place(LONG, "host") == "host"


def test_what_is_counted() -> None:
    """By hand: 8.03 billion weights, 128 KiB of keys and values a token."""
    parts = room(LLAMA8B).needed_gib(LONG, "resident")
    assert parts["weights"] == pytest.approx(8.03e9 * 2 / 2**30, rel=0.002)
    assert parts["keys, values and states"] == pytest.approx((131072 + 40) * 128 / 2**20, rel=1e-6)
    assert parts["one layer's work"] > 131072 * 4096 * 2 * 3 / 2**30
    halves = room(LLAMA8B, sp=2).needed_gib(LONG, "sharded")
    assert halves["keys, values and states"] < 0.51 * parts["keys, values and states"]
    assert halves["weights"] == pytest.approx((1.05e9 + 6.98e9 / 2 + 2 * 6.98e9 / 32) * 2 / 2**30, rel=0.002)
    assert room(LLAMA8B).needed_gib(Asked(131072), "resident")["keys, values and states"] == 0  # losses keep none


def test_states_and_latent_keys() -> None:
    """Of a hybrid each text has a state, however short; of latent attention one row serves all heads."""
    hybrid = AutoConfig.for_model("qwen3_next", num_experts=0)
    facts, kept = ModelFacts.from_config(hybrid), "keys, values and states"
    state = sum(each.state.heads * each.state.keys * each.state.values * 4 for each in facts.by_layer if each.state)
    assert state > 36 * 2**20
    one, many = (
        Room(facts, hybrid, 1, 1, "", 139.8, 200).needed_gib(Asked(4096, texts, 1), "resident")[kept]
        for texts in (1, 64)
    )
    assert many - one > 63 * state / 2**30
    deepseek = AutoConfig.for_model("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=4)
    found = Room(ModelFacts.from_config(deepseek), deepseek, 1, 1, "", 139.8, 200).needed_gib(
        Asked(4096, 1, 1), "resident"
    )
    assert found[kept] == pytest.approx(4097 * 4 * (512 + 64) * 2 / 2**30)


@pytest.mark.parametrize(
    ("given", "asked", "where", "said"),
    [
        ({}, Asked(8 * 131072, 8, 40), "auto", ["--sp", "--batch_tokens", "--quantize nf4", "weights host"]),
        (
            {"quantize": "nf4", "sp": 8},
            Asked(32 * 131072, 1, 1),
            "resident",
            ["--weights auto", "--sp", "weights resident"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], asked: Asked, where: Any, said: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        room(LLAMA8B, gib=22, **given).place(asked, where)
    assert f"{asked.tokens:,} tokens of {asked.texts} text(s)" in str(refused.value)
    assert all(part in str(refused.value) for part in said)
    assert ("--quantize" in str(refused.value)) == ("--quantize nf4" in said)


def test_flags_that_do_not_go_together() -> None:
    for flags, said in (
        (Ranks(weights="sharded"), "--weights sharded, --sp 1"),
        (Ranks(gpus=4, sp=2, weights="sharded"), "4 GPUs"),
        (Flags(server="http://localhost:8000/v1", quantize="nf4"), "leave out --weights and --quantize"),
    ):
        with pytest.raises(ConfigError, match=said):
            flags.check()
    Ranks(sp=2, weights="sharded").check()
