"""Each kind of layer with a state, its heads an odd number, in every combination of sp, dp, ZeRO stage and adapters.

Without the engine in float64 to 1e-10, through it in float32 to 1e-6, against plain transformers with each document
alone. Recomputation policies go round, so that each meets every other setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed import test_engine
from tests.distributed.models import reference_sum, relative_error
from tests.distributed.pool import WorkerPool
from tests.distributed.test_engine import baseline_step
from tests.distributed.test_exact import in_float64, wide_gradients, wide_reference
from tests.distributed.test_state_exact import FAMILIES, NEMOTRON, engine_step

FIVE = {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 40}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated delta, 9 value and 3 key heads": FAMILIES["Qwen3.5, 9 value and 3 key heads"],
    "KDA, 5 heads": FAMILIES["Kimi-Linear"],
    "Mamba-2, 9 heads in 3 groups": (
        "nemotron_h",
        {**NEMOTRON, "mamba_num_heads": 9, "n_groups": 3, "mamba_n_heads": 9, "mamba_n_groups": 3},
    ),
    "Mamba-1, 45 channels": ("jamba", {**FAMILIES["Jamba"][1], **FIVE, "hidden_size": 45, "mamba_expand": 1}),
    "lightning, 5 heads": FAMILIES["MiniMax"],
    "short convolution, 5 heads": ("lfm2", {**FAMILIES["LFM2"][1], **FIVE}),
}
LENGTHS = ([1, 20, 1, 1, 50, 1], [1, 1, 2, 1, 1])  # at sp 4 ranks of two tokens
OF_TORCH = ("none", "full", "every_k", "sqrt", "keep_attention")
POLICIES = (*OF_TORCH, "auto", "fused")
PLACES = list(product(KINDS, (1, 2, 3, 4), (1, 2)))
ZERO = list(product((0, 2, 3), (False, True)))


@pytest.fixture(scope="module")
def all_pools(pools: Callable[[int], WorkerPool]) -> Iterator[Callable[[int], WorkerPool]]:
    """Pools of the session, and those that only this module needs, one at a time."""
    made: list[WorkerPool] = []

    def pool(world: int) -> WorkerPool:
        if world in (1, 2, 3, 4):
            return pools(world)
        if not made or made[-1].world != world:
            for old in made:
                old.stop()
            made[:] = [WorkerPool(world)]
        return made[-1]

    yield pool
    for each in made:
        each.stop()


def packed_step(rank: int, world: int, *args: Any) -> Any:
    """`engine_step` of these documents."""
    with patch.object(test_engine, "LENGTHS", LENGTHS):
        return engine_step(rank, world, *args)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "sp", "dp"), sorted(PLACES, key=lambda place: place[1] * place[2]))
def test_every_combination(all_pools, kind, sp, dp):
    (family, changes), pool = KINDS[kind], all_pools(sp * dp)
    number, worst = 6 * PLACES.index((kind, sp, dp)), {"float64": 0.0, "float32": 0.0}
    for lora in (False, True):
        policy = OF_TORCH[(number // 3 + lora) % len(OF_TORCH)]
        loss, grads = pool.run(wide_gradients, family, changes, lora, policy, False, sp, LENGTHS)[0]
        ref_loss, ref = wide_reference(family, changes, lora, False, LENGTHS)
        assert loss == pytest.approx(ref_loss, rel=1e-10)
        errors = {name: relative_error(grads[name], ref[name]) for name in ref}
        assert {name: f"{e:.1e}" for name, e in errors.items() if not e <= 1e-10} == {}, (policy, lora)
        worst["float64"] = max(worst["float64"], *errors.values())
    changed, truths = {**changes, "model_type": family}, {}
    with (
        patch.object(test_engine, "LENGTHS", LENGTHS),
        patch.object(test_engine, "reference_sum", in_float64()(reference_sum)),
    ):
        for lora in (False, True):
            truths[lora] = baseline_step(1, dp, lora, changed, False, sp, False)
    for i, (stage, lora) in enumerate(ZERO):
        policy = POLICIES[(number + i) % len(POLICIES)]
        loss, _, grads = pool.run(packed_step, family, changes, sp, stage, 1, lora, policy, False)[0]
        ref_loss, ref = truths[lora]
        ref = {n: g for n, g in ref.items() if g is not None}
        whole = torch.cat([g.flatten() for g in ref.values()]).norm()
        errors = {n: float((grads[n].double() - ref[n]).norm() / whole) for n in ref}
        errors["loss"] = abs(loss / ref_loss - 1)
        assert {n: f"{e:.1e}" for n, e in errors.items() if not e <= 1e-6} == {}, (stage, policy, lora)
        worst["float32"] = max(worst["float32"], *errors.values())
    print(f"{kind}, sp {sp}, dp {dp}: largest errors {worst['float64']:.1e}, {worst['float32']:.1e}")


def test_policies_meet_every_setting() -> None:
    cells = [
        (kind, sp, dp, stage, lora, POLICIES[(6 * n + i) % len(POLICIES)])
        for n, (kind, sp, dp) in enumerate(PLACES)
        for i, (stage, lora) in enumerate(ZERO)
    ]
    for position in range(5):
        values = {cell[position] for cell in cells}
        assert {(cell[position], cell[5]) for cell in cells} == set(product(values, POLICIES))
