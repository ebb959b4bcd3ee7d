"""Documents that lie whole on the ranks of a group: nothing travels for attention, and the engine's gradients stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.distributed.models import dealt, make_pack, tiny_config, tiny_model
from tests.distributed.pool import WorkerPool
from tests.distributed.test_engine import HEADS_9_3, assert_equal, baseline_step, one_step


@pytest.mark.parametrize(
    ("world", "sp", "stage", "accumulation", "lora", "policy", "changes"),
    [
        (2, 2, 3, 3, True, "fused", {}),
        (2, 2, 2, 1, False, "auto", {}),
        (4, 2, 3, 3, False, "keep_attention", {}),
        (4, 4, 1, 1, True, "auto", HEADS_9_3),
    ],
)
def test_engine_equals_one_process(
    pools: Callable[[int], WorkerPool], world: int, sp: int, stage: int, accumulation: int, lora: bool, policy: str,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    arguments = (sp, stage, accumulation, lora, policy, changes, False, False, True)
    found = pools(world).run(one_step, *arguments)[0]
    assert_equal(found, baseline_step(accumulation, world // sp, lora, changes, False, sp, False))


def exchanges(rank: int, world: int, whole: bool) -> tuple[int, list[int]]:
    """Collectives of a forward and backward pass of one pack, and the tokens of each rank."""
    import torch.distributed as dist

    from ds_longft.layout import ParallelLayout
    from ds_longft.objectives.sft import SftObjective
    from ds_longft.sequence.attention import ULYSSES, register
    from ds_longft.sequence.shard import shard

    register()
    layout = ParallelLayout.create(world)
    objective = SftObjective(tiny_model(tiny_config(), attn=ULYSSES, dtype=torch.float32), layout)
    pack = make_pack([20, 30, 25, 9], seed=0, multiple=world)
    batch = shard(dealt(pack, world) if whole else pack, layout, torch.device("cpu"))
    with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as calls:
        objective(batch).backward()
    return calls.call_count, [batch.input_ids.shape[1]]


def test_nothing_travels_for_attention(pools: Callable[[int], WorkerPool]) -> None:
    split, whole = (pools(2).run(exchanges, flag) for flag in (False, True))
    assert all(count > 0 for count, _ in split), "the count counts"
    assert [count for count, _ in whole] == [0, 0]
    assert [tokens for _, tokens in split] == [[42], [42]]
    assert [tokens for _, tokens in whole] == [[50], [34]]
