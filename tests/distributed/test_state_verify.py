"""`verify` passes hybrid models, and finds what could be wrong with their states."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ds_longft.sequence.state import mixers
from ds_longft.sequence.state.spread import Spread
from tests.distributed.test_state_exact import FAMILIES, ODD
from tests.distributed.test_verify import ALL, verified
from tests.distributed.user_files import user_config


def state_not_reset(stack: ExitStack) -> None:
    def faulty(layer: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, documents: Any, *_: Any) -> Any:
        return plain(layer, q, k, v, g, beta, type(documents)(documents.cu_seqlens, (sum(documents.lengths),)))

    plain = mixers.delta_rule
    stack.enter_context(patch.object(mixers, "delta_rule", faulty))


def halo_missing(stack: ExitStack) -> None:
    def faulty(self: Spread, x: torch.Tensor, tokens: int) -> Any:
        positions = self.documents.positions
        return x, positions[self.rank * len(x) :][: len(x)] if self.group is not None else positions

    stack.enter_context(patch.object(Spread, "with_halo", faulty))


def gates_not_exchanged(stack: ExitStack) -> None:
    def faulty(self: Spread, tensors: Any, ranges: Any) -> Any:
        if self.group is None:
            return tuple(tensors)
        dealt = plain(self, tensors, ranges)
        own = [ranges[self.rank][i] for i in (3, 4)]  # this rank's tokens, over and over
        gates = [t[:, r.start : r.stop].repeat(self.sp, 1) for t, r in zip(tensors[3:], own, strict=True)]
        return (*dealt[:3], *gates)

    plain = Spread.to_heads
    stack.enter_context(patch.object(Spread, "to_heads", faulty))


def groups_dealt_wrongly(stack: ExitStack) -> None:
    def faulty(t: torch.Tensor, share: Any) -> torch.Tensor:
        right = plain(t, share)
        return right if share.repeat is None else right.roll(1, 1)

    plain = mixers._as_read
    stack.enter_context(patch.object(mixers, "_as_read", faulty))


FAULTS = {f.__name__: f for f in (state_not_reset, halo_missing, gates_not_exchanged, groups_dealt_wrongly)}


def state_verified(rank: int, world: int, content: dict[str, Any], checks: frozenset[int], fault: str | None) -> Any:
    """`verified` in a process where `fault` was planted."""
    with ExitStack() as stack:
        if fault is not None:
            FAULTS[fault](stack)
        return verified(rank, world, content, checks, None)


def content_of(folder: Any, family: str, stage: int = 2) -> dict[str, Any]:
    model_type, changes = FAMILIES[family]
    return user_config(folder, stage=stage, family=model_type, **changes)


ODD_HEADS = "Qwen3.5, 9 value and 3 key heads"  # on 2 ranks a group of keys is read by both
PLANTED = [
    # fault, family, number of the check that has to fail
    ("state_not_reset", ODD_HEADS, 2),
    ("halo_missing", "LFM2", 1),
    ("gates_not_exchanged", ODD_HEADS, 1),
    ("groups_dealt_wrongly", ODD_HEADS, 1),
]


@pytest.mark.parametrize(("fault", "family", "number"), PLANTED)
def test_a_planted_fault_is_found(pools, tmp_path, fault, family, number):
    assert ODD["linear_num_value_heads"] % 2
    content = content_of(tmp_path, family)
    findings, _, _ = pools(2).run(state_verified, content, frozenset({1, 2}), fault)[0]
    failed = {int(f.check[0]) for f in findings if f.ok is False}
    assert number in failed, findings


@pytest.mark.parametrize(
    ("family", "stage"),
    [
        (ODD_HEADS, 3),
        pytest.param("Nemotron-H", 3, marks=pytest.mark.slow),
        pytest.param("LFM2", 2, marks=pytest.mark.slow),
    ],
)
def test_what_is_right_passes(pools, tmp_path, family, stage):
    findings, _, _ = pools(2).run(state_verified, content_of(tmp_path, family, stage), ALL, None)[0]
    assert [f for f in findings if f.ok is False] == []
    assert {f.check[0] for f in findings} == set("12345678")
