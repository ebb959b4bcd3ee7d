"""A base in fewer bits: loss and adapters' gradients are those of the dequantised base, run by transformers and PEFT one
document at a time. What dequantised means: `tests/unit/model/test_packed.py`.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from tests.distributed import test_engine, test_exact, test_frozen, test_matrix

EXPERTS = {**test_exact.MOE, "num_experts": 4, "moe_intermediate_size": 32}
SINKS = {**test_exact.SINKS, "intermediate_size": 64, "hidden_size": 64}
TILE = {"tile": 7}
SLOW = pytest.mark.slow

IN_FLOAT64 = {
    # family, config changes, base and more of LoRA, recompute policy, world, sp, ways to save
    "nf4": ("llama", {}, {"base": "nf4"}, "keep_attention", 2, 2, {"linears": True}),
    "nf4, tiles": ("qwen3", {}, {"base": "nf4"}, "full", 2, 2, TILE),
    "nf4, plain linears": ("llama", {}, {"base": "nf4"}, "none", 2, 1, None),
    "nf4, segments": ("llama", {"num_hidden_layers": 5}, {"base": "nf4"}, "sqrt", 4, 2, TILE),
    "int8": ("llama", {}, {"base": "int8"}, "keep_attention", 4, 4, {"linears": True}),
    "fp8, biases": ("qwen2", {}, {"base": "fp8"}, "full", 2, 2, TILE),
    "nf4, whole documents": ("llama", {}, {"base": "nf4"}, "keep_attention", 2, 2, {"whole": True, "linears": True}),
    "nf4, DoRA": ("llama", {}, {"base": "nf4", "dora": True}, "full", 2, 2, {"linears": True}),
    "nf4, experts": ("qwen3_moe", EXPERTS, {"base": "nf4", "experts": True}, "full", 2, 2, TILE),
    "nf4, frozen experts": ("mixtral", EXPERTS, {"base": "nf4"}, "keep_attention", 2, 2, TILE),
    "int8, experts with biases": ("gpt_oss", SINKS, {"base": "int8", "experts": True}, "full", 2, 2, TILE),
    "mxfp4, experts": ("gpt_oss", SINKS, {"base": "mxfp4", "experts": True}, "full", 2, 2, TILE),
    "mxfp4, frozen experts": ("gpt_oss", SINKS, {"base": "mxfp4"}, "keep_attention", 4, 4, TILE),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_gradients_are_those_of_the_dequantised_base(pools, name: str) -> None:
    family, changes, lora, policy, world, sp, saving = IN_FLOAT64[name]
    ours = pools(world).run(test_exact.gradients, family, changes, lora, policy, False, sp, test_exact.PACKS, saving)[0]
    test_exact.assert_equal(ours, test_exact.reference(family, changes, lora, False))


THROUGH_THE_ENGINE = [
    # world, sp, stage, accumulation, base, policy, config changes
    (2, 2, 3, 1, "nf4", "auto", {}),
    (2, 1, 0, 3, "nf4", "fused", {}),
    (2, 2, 2, 3, "fp8", "auto", {}),
    (2, 1, 3, 1, "int8", "full", {}),
    (2, 2, 3, 1, "nf4", "grouped", {**test_engine.EXPERTS, "moe_intermediate_size": 32}),
    (2, 2, 2, 1, "int8", "grouped", test_engine.EXPERTS),
    (2, 2, 3, 1, "mxfp4", "grouped", {**SINKS, "model_type": "gpt_oss"}),
    pytest.param(2, 1, 0, 3, "mxfp4", "grouped", {**SINKS, "model_type": "gpt_oss"}, marks=SLOW),
    pytest.param(2, 1, 1, 1, "nf4", "auto", {}, marks=SLOW),
    pytest.param(2, 1, 0, 1, "fp8", "fused", {}, marks=SLOW),
]


@pytest.mark.parametrize(("world", "sp", "stage", "accumulation", "base", "policy", "changes"), THROUGH_THE_ENGINE)
def test_every_stage_gives_the_gradients_of_one_process(
    pools: Any, world: int, sp: int, stage: int, accumulation: int, base: str, policy: str, changes: dict[str, Any]
) -> None:
    lora = {"base": base}
    found = pools(world).run(test_engine.one_step, sp, stage, accumulation, lora, policy, changes, False, False)[0]
    truth = test_engine.baseline_step(accumulation, world // sp, lora, changes, False, sp, False)
    test_engine.assert_equal(found, truth)


def rows() -> list[tuple[str, str, int, int]]:
    """(where the base lies, its format, sp, ZeRO stage) of every step that is compared here, in `test_frozen` and, of
    dense ones in the engine, in `test_matrix`.
    """
    cases = [getattr(case, "values", case) for case in THROUGH_THE_ENGINE]
    found = [("engine", base, sp, stage) for _, sp, stage, _, base, *_ in cases]
    for base, sp, stage, _, _, keys in [*test_frozen.CASES.values(), *test_frozen.MORE.values()]:
        found.append((base, keys.get("model", {}).get("quantize", ""), sp, stage))
    return found + [("engine", "", row[0], row[3]) for row in test_matrix.TABLE]


def test_every_pair_of_store_format_sp_and_stage_is_compared() -> None:
    settings = [["engine", "host", "sharded"], ["", "nf4", "int8", "fp8", "mxfp4"], [1, 2], [0, 1, 2, 3]]
    missing = [
        (x, y)
        for (i, xs), (j, ys) in combinations(enumerate(settings), 2)
        for x, y in product(xs, ys)
        if not any(row[i] == x and row[j] == y for row in rows())
    ]
    assert missing == []
