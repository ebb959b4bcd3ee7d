"""Which model types are proved: what the walk finds today is what `proved.json` says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ds_longft.config.proof import proofs
from tests.distributed.pool import WorkerPool
from tests.distributed.walk import find
from tests.unit.sequence.zoo import model_types

TYPES = proofs()["types"]
MOST_USED = (
    "cohere2", "deepseek_v3", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "glm4_moe", "gpt_oss", "granite", "llama", "llama4",
    "mistral", "mistral3", "mixtral", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_5_vl", "qwen3", "qwen3_5", "qwen3_moe", "qwen3_next",
    "qwen3_vl",
)  # fmt: skip


def check(pools: Callable[[int], WorkerPool], model_type: str) -> None:
    found, said = find(pools(2), model_type), TYPES.get(model_type)
    assert said is not None, f"transformers has a new type: python -m tests.distributed.write_models {model_type}"
    assert found.keys() == said.keys(), (found, said)


@pytest.mark.parametrize("model_type", MOST_USED)
def test_the_most_used_are_proved(pools: Callable[[int], WorkerPool], model_type: str) -> None:
    assert "proved" in TYPES[model_type]
    check(pools, model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in model_types() if name not in MOST_USED])
def test_all_others_are_what_is_said_of_them(pools: Callable[[int], WorkerPool], model_type: str) -> None:
    check(pools, model_type)
