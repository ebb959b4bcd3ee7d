"""Every way to save memory, on every model type: loss and gradients of transformers' own step."""

from __future__ import annotations

import contextlib

import pytest

from ds_longft.errors import ModelError
from ds_longft.model.supported import check_supported
from tests.unit.sequence.zoo import WAYS, Step, model_types, ours, tiny, truth

MOST_USED = (
    "cohere2", "deepseek_v3", "diffllama", "gemma2", "gemma3_text", "gemma3n_text", "glm4_moe", "gpt_oss",
    "granite", "llama", "mistral", "mixtral", "olmo3", "phi3",
    "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip

EXACT = (
    "ernie4_5_moe", "exaone4", "hunyuan_v1_dense", "minimax_m2", "ministral3", "phimoe", "qwen2_moe", "seed_oss",
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "beam", "bitnet", "cohere", "cohere2_moe", "cwm", "deepseek_v2",
    "dots1", "ernie4_5", "exaone", "exaone_moe", "flex_olmo", "flint", "gemma", "glm", "glm4", "glm4_moe_lite", "gpt_neox",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
    "internlm3", "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3",
    "minimax_m3_vl_text", "ministral", "moshi", "nanochat", "olmo", "olmo2", "olmoe", "opt", "persimmon", "phi", "sarvam_mla",
    "sarvam_moe", "solar_open", "vaultgemma", "youtu",
)  # fmt: skip
"""The others of transformers 5.24 that are done."""

REFUSED = {
    "dory": "not a linear layer",
    "doge": "computes with its attention mask",
    "nemotron": "without `documents` and `layout`",
    "modernbert-decoder": "no list of decoder layers",
}
"""Some that are not done: refused by name, not done otherwise."""


def compare(model_type: str) -> dict[str, str]:
    """What differs in which way; nothing should."""
    config = tiny(model_type)
    expected: Step = truth(config)
    seen = {name: ours(config, way).differs(expected) for name, way in WAYS.items()}
    return {name: line for name, line in seen.items() if line is not None}


@pytest.mark.parametrize("model_type", MOST_USED)
def test_the_most_used(model_type: str) -> None:
    assert compare(model_type) == {}


@pytest.mark.parametrize("model_type", [name for name in REFUSED if name in model_types()])
def test_refused(model_type: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[model_type]):
        compare(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXACT)
def test_the_others(model_type: str) -> None:
    if model_type not in model_types():
        pytest.skip("this transformers does not have it")
    assert compare(model_type) == {}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(model_types()) - {*MOST_USED, *EXACT, *REFUSED}))
def test_what_is_left_is_refused_or_exact(model_type: str) -> None:
    """Types that this small a config does not make are left out."""
    try:
        config = tiny(model_type)
        check_supported(config)
        truth(config)
    except ModelError:
        return
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    with contextlib.suppress(ModelError):
        assert compare(model_type) == {}
