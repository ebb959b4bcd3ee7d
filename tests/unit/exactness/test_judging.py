"""A check never loses what it found: not a number, nor two faults of opposite sign."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from ds_longft.batch import Batch, Pack
from ds_longft.data.pack import pack_of
from ds_longft.exactness import isolation, labels
from ds_longft.exactness.engine_step import Gradients
from ds_longft.exactness.finding import TOLERANCE
from ds_longft.exactness.gradients import difference, judge
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.kernels import AttentionSpec, Saved
from ds_longft.tools.verify.kernel_error import Asked, check_kernels

CPU, ALONE = torch.device("cpu"), ParallelLayout(1, 0, 1)


def pack(lengths: list[int], rows: tuple[int, ...] = ()) -> Pack:
    """Documents whose every token but the last is a target."""
    documents = []
    for n in lengths:
        ids = np.arange(n, dtype=np.int64)
        documents.append((ids, np.append(ids[1:], -100), np.ones(n, np.float32)))
    return replace(pack_of(documents, 1), rows=rows)


def itself(value: Any) -> list[Any]:
    """What one rank gathers."""
    return [value]


@pytest.mark.parametrize("where", [0, 1])
def test_a_kernel_that_gives_no_number_on_any_rank_fails(where: int) -> None:
    asked = [Asked(AttentionSpec(0.25), 16, torch.float32, "cpu", "")]
    heads = SimpleNamespace(q_heads=4, kv_heads=2)

    class Broken:
        """On its rank: attention whose keys' gradient is no number."""

        def forward(self, q: Any, k: Any, v: Any, *args: Any) -> Any:
            return torch.zeros_like(q), None

        def backward(self, dout: Any, saved: Saved, *args: Any) -> Any:
            return torch.zeros_like(saved.q), torch.full_like(saved.k, math.nan), torch.zeros_like(saved.v)

    right: list[Any] = []
    check_kernels(asked, heads, pack([32]), ALONE, CPU, lambda value: right.append(value) or [value])  # type: ignore[arg-type]

    def two_ranks(value: Any) -> list[Any]:
        return [value, right[0]] if where == 0 else [right[0], value]

    from ds_longft.tools.verify import kernel_error

    plain = kernel_error.kernel_by_name
    with patch.object(kernel_error, "kernel_by_name", lambda name: Broken() if name == "cpu" else plain(name)):
        found = check_kernels(asked, heads, pack([32]), ALONE, CPU, two_ranks)
    assert [f.ok for f in found] == [False]
    assert "worst of dk" in found[0].what


LOST = replace(pack([8, 8, 8], (0, 1, 2)), cu_seqlens=np.array([0, 8, 24], np.int32))
EXTRA = replace(pack([8, 8], (3, 4)), cu_seqlens=np.array([0, 4, 8, 16], np.int32))


@pytest.mark.parametrize(
    ("packs", "count", "cause"),
    [
        ([pack([8, 8], (0, 1))], 0, ""),
        ([LOST], 1, "1 borders between rows are missing"),
        ([EXTRA], 1, "1 borders in the packs' cu_seqlens are none between rows"),
        ([LOST, EXTRA], 2, "1 borders between rows are missing"),
    ],
)
def test_a_border_lost_and_one_too_many_are_two(packs: list[Pack], count: int, cause: str) -> None:
    found = isolation.check_borders(packs, itself)
    assert (found.ok, found.value) == (count == 0, count)
    assert cause in found.note


def test_a_border_lost_on_one_rank_and_one_too_many_on_another_are_two() -> None:
    of_other = iter([0, 1])  # lost, too many
    found = isolation.check_borders([LOST], lambda value: [value, next(of_other)])
    assert (found.ok, found.value) == (False, 2)


@pytest.mark.parametrize("broken", ["a", "b", "c"])
def test_a_gradient_that_is_no_number_is_the_worst(broken: str) -> None:
    """Wherever it stands among the parameters."""
    truth = {name: torch.ones(3) for name in "abc"}
    ours = {name: torch.full((3,), math.nan) if name == broken else g + 0.1 for name, g in truth.items()}
    d = difference(Gradients(1.0, ours), Gradients(1.0, truth))
    assert d.worst_name == broken
    assert math.isinf(d.worst)
    for rounding in (None, d):  # also where one process alone gives no number
        rows, _ = judge(
            "",
            Gradients(1.0, ours),
            Gradients(1.0, truth),
            TOLERANCE[torch.float32],
            cause=lambda _: "",
            rounding=rounding,
        )
        assert [row.ok for row in rows] == [True, False, False, False]


def states(shape: torch.Tensor, *wrong: tuple[int, float]) -> torch.Tensor:
    """[s, D] hidden states, at some tokens another value."""
    made = shape.clone()
    for at, value in wrong:
        made[at] = value
    return made


MOVED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], list[bool]]] = {
    # what a changed token 4 of [0, 8) moves -> whether other documents, earlier tokens, its own pass
    "itself": (lambda x: states(x, (4, 1.0)), [True, True, True]),
    "a neighbour": (lambda x: states(x, (4, 1.0), (9, 0.5)), [False, True, True]),
    "a neighbour to no number": (lambda x: states(x, (4, 1.0), (9, math.nan)), [False, True, True]),
    "an earlier token to no number": (lambda x: states(x, (4, 1.0), (1, math.nan)), [True, False, True]),
    "itself to no number": (lambda x: states(x, (4, math.nan)), [True, True, False]),
    "itself to infinity": (lambda x: states(x, (4, math.inf)), [True, True, False]),
    "all to no number": (lambda x: x * math.nan, [False, False, False]),
    "nothing": (lambda x: x, [True, True, False]),
}


@pytest.mark.parametrize("name", MOVED)
def test_hidden_states_that_are_no_numbers_fail(name: str) -> None:
    move, passes = MOVED[name]
    whole = pack([8, 3, 3], (0, 1, 2))
    rest = torch.zeros(14, 2)

    def hidden(engine: Any, changed: Pack, *args: Any) -> torch.Tensor:
        at = np.flatnonzero(changed.input_ids != whole.input_ids)
        return rest if not len(at) else move(rest) if at[0] == 4 else states(rest, (int(at[0]), 1.0))

    with patch.object(isolation, "_hidden_states", hidden), patch.object(isolation.dist, "all_reduce"):
        found = isolation.check_isolation(None, whole, ALONE, CPU, 1e-6, 100)
    assert [f.ok for f in found] == passes


def test_a_target_lost_on_one_rank_and_one_doubled_on_another_are_two() -> None:
    whole = pack([8, 8], (0, 1))
    plain = labels.shard

    def faulty(of: Pack, layout: ParallelLayout, device: torch.device) -> Batch:
        batch = plain(of, layout, device)
        rows = [0, 0, 1, 2, 3, 4, 5, 6] if layout.rank else [0, 1, 2, 3, 4, 5]
        return replace(
            batch,
            target_rows=torch.tensor(rows),
            targets=batch.targets[rows],
            target_weights=batch.target_weights[rows],
        )

    layouts = [ParallelLayout(2, rank, 2) for rank in (0, 1)]
    with patch.object(labels, "shard", faulty):
        counts = [labels._count([whole], layout) for layout in layouts]
        found = labels.check_labels([whole], 14.0, layouts[0], lambda _: counts)
    assert [f.ok for f in found] == [True, True, False, True]
    assert "2 targets are lost or doubled" in found[2].note
    assert labels.check_labels([whole], 14.0, ALONE, itself)[2].ok


def test_weights_that_differ_on_the_way_to_the_ranks_are_found() -> None:
    """Though their sum is right."""
    whole, plain = pack([8, 8], (0, 1)), labels.shard

    def faulty(*args: Any) -> Batch:
        batch = plain(*args)
        weights = batch.target_weights.clone()
        weights[0], weights[1] = 0.5, 1.5
        return replace(batch, target_weights=weights)

    with patch.object(labels, "shard", faulty):
        found = labels.check_labels([whole], 14.0, ALONE, itself)
    assert [f.ok for f in found] == [True, True, False, True]
