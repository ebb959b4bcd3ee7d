"""Every pair of settings together in at least one step through the engine, in float32: each parameter's gradient is that of one
process to 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed import test_engine
from tests.distributed.models import relative_error
from tests.distributed.pool import WorkerPool
from tests.distributed.test_engine import HEADS_9_3, TIED, baseline_step, one_step

SINGLE = ([41], [97], [66], [63], [71], [64])  # documents alone in their packs
PLAIN: dict[str, Any] = {}

SETTINGS: dict[str, list[Any]] = {
    "sp": [1, 2, 3, 4],
    "dp": [1, 2],
    "accumulation": [1, 3],
    "ZeRO stage": [0, 1, 2, 3],
    "packed": [True, False],
    "recompute": ["none", "full", "every_k", "sqrt", "keep_attention"],
    "sample weighting": [False, True],
    "LoRA": [False, True],
    "heads": [PLAIN, HEADS_9_3, TIED],
    "targets in the first half only": [False, True],
}

TABLE = [
    (1, 1, 1, 0, True, "sqrt", False, False, PLAIN, False),
    (1, 1, 1, 2, False, "keep_attention", False, False, TIED, True),
    (1, 1, 1, 3, False, "full", False, False, HEADS_9_3, False),
    (1, 1, 1, 2, True, "every_k", False, False, PLAIN, False),
    (1, 1, 1, 0, True, "full", False, False, PLAIN, False),
    (1, 1, 1, 3, True, "sqrt", False, False, PLAIN, False),
    (1, 2, 3, 1, False, "none", True, True, HEADS_9_3, True),
    (2, 1, 1, 2, True, "full", True, True, TIED, True),
    (2, 1, 1, 3, True, "none", False, True, PLAIN, False),
    (2, 1, 1, 1, True, "every_k", False, False, TIED, False),
    (3, 1, 1, 0, True, "every_k", True, True, HEADS_9_3, True),
    (3, 1, 1, 1, True, "full", False, False, PLAIN, False),
    (3, 1, 1, 2, True, "sqrt", False, False, HEADS_9_3, False),
    (3, 1, 1, 0, True, "keep_attention", False, False, PLAIN, False),
    (3, 1, 1, 2, True, "none", False, False, PLAIN, False),
    (2, 2, 1, 1, True, "keep_attention", False, False, HEADS_9_3, False),
    (2, 2, 3, 0, False, "sqrt", True, False, TIED, True),
    (4, 1, 3, 3, False, "keep_attention", True, True, PLAIN, True),
    (4, 1, 1, 1, False, "sqrt", True, True, HEADS_9_3, False),
    (4, 1, 1, 0, True, "none", False, False, TIED, False),
    (4, 1, 1, 0, True, "every_k", False, False, PLAIN, False),
    (3, 2, 3, 3, False, "every_k", False, False, TIED, False),
    (4, 2, 3, 2, True, "full", False, False, PLAIN, False),
]


@pytest.fixture(scope="module")
def large_pools() -> Iterator[Callable[[int], WorkerPool]]:
    """Pools that only this module needs."""
    made: dict[int, WorkerPool] = {}
    yield lambda world: made.setdefault(world, WorkerPool(world))
    for each in made.values():
        each.stop()


def matrix_step(rank: int, world: int, lengths: Any, *settings: Any) -> Any:
    with patch.object(test_engine, "LENGTHS", lengths):
        return one_step(rank, world, *settings)


def test_every_pair_of_settings_is_in_the_table():
    missing = [
        f"{a} {x!r} with {b} {y!r}"
        for (i, (a, xs)), (j, (b, ys)) in combinations(enumerate(SETTINGS.items()), 2)
        for x in xs
        for y in ys
        if not any(row[i] == x and row[j] == y for row in TABLE)
    ]
    assert missing == []


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "-".join(str(v) for v in row[:8]))
def test_step_equals_one_process(pools, large_pools, row):
    sp, dp, accumulation, stage, packed, policy, sample, lora, changes, half = row
    world, lengths = sp * dp, test_engine.LENGTHS if packed else SINGLE
    pool = (pools if world in (2, 4) else large_pools)(world)
    loss, norm, grads = pool.run(matrix_step, lengths, sp, stage, accumulation, lora, policy, changes, sample, half)[0]
    with patch.object(test_engine, "LENGTHS", lengths):
        ref_loss, ref = baseline_step(accumulation, dp, lora, changes, sample, sp, half)
    assert loss == pytest.approx(ref_loss, rel=1e-6)
    assert set(grads) == set(ref)
    whole = torch.cat([g.flatten().double() for g in ref.values()]).norm()
    # Against the whole gradient: those of q and k are small differences of large terms.
    assert {n: f"{e:.1e}" for n in ref if (e := float((grads[n].double() - ref[n]).norm() / whole)) > 1e-6} == {}
    assert {n: f"{e:.1e}" for n in ref if (e := relative_error(grads[n], ref[n])) > 2e-6} == {}
    if norm is not None:
        assert norm == pytest.approx(float(whole), rel=1e-6)


def no_target_at_all(rank: int, world: int, stage: int) -> Any:
    """A whole step without any target: zeros, not NaN, in every gradient."""
    import deepspeed

    from ds_longft.exactness.engine_step import step_gradients, weights_held
    from ds_longft.layout import ParallelLayout
    from ds_longft.objectives.sft import SftObjective
    from ds_longft.sequence.attention import ULYSSES, register
    from ds_longft.train.step import backpropagate
    from tests.distributed.models import make_pack, tiny_config, tiny_model

    register()
    layout = ParallelLayout.create(2)
    objective = SftObjective(tiny_model(tiny_config(), attn=ULYSSES, dtype=torch.float32), layout)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=torch.optim.SGD(objective.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    pack = test_engine.without_targets(make_pack([20, 11], seed=0, multiple=2), 0)
    with weights_held(engine):
        found = step_gradients(engine, backpropagate, [pack, pack], 0.0, layout, torch.device("cpu"))
    engine.destroy()
    return found.loss, {n: float(g.abs().max()) for n, g in found.grads.items()}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_step_without_targets_has_a_gradient_of_zero(pools, stage):
    loss, largest = pools(2).run(no_target_at_all, stage)[0]
    assert loss == 0
    assert len(largest) > 10
    assert set(largest.values()) == {0.0}
