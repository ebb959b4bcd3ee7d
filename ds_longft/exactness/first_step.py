"""Checks 1 to 3 on a run's own engine and first step, before it trains: nothing of the run is changed by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ds_longft.batch import Step
from ds_longft.errors import ModelError
from ds_longft.exactness.engine_step import Backpropagate, step_gradients, weights_held
from ds_longft.exactness.finding import TOLERANCE, Finding, Gather
from ds_longft.exactness.gradients import Suspects, judge
from ds_longft.exactness.isolation import check_borders, check_isolation
from ds_longft.exactness.labels import check_labels
from ds_longft.exactness.packs import shortened, two_documents, weight_of
from ds_longft.layout import ParallelLayout
from ds_longft.model.dropout import without_dropout


def check_first_step(
    engine: Any,
    step: Step,
    layout: ParallelLayout,
    device: torch.device,
    *,
    backpropagate: Backpropagate,
    gather: Gather,
    vocab_size: int,
    dtype: torch.dtype,
) -> list[Finding]:
    """Findings of checks 1 to 3. Collective; the same on every rank.

    The packs are cut to a rank's share of their tokens: without sp each rank then works on as many tokens as the run
    gives it anyway, and the check needs no more memory than the run.
    """
    findings = [check_borders(step.packs, gather), *check_labels(step.packs, step.total_weight, layout, gather)]
    first = step.packs[0]
    pack = shortened(first, max(first.tokens // layout.sp, 8), layout.sp)
    weight = sum(gather(weight_of([pack]))) / layout.sp
    alone = replace(layout, sp=1, group=None)
    with weights_held(engine), without_dropout(engine.module):
        # Without sp all ranks of a group work on the same whole pack: sp times the weight.
        reference = step_gradients(engine, backpropagate, [pack], weight * layout.sp, alone, device)
        ours = step_gradients(engine, backpropagate, [pack], weight, layout, device)
        # One pack for all: samples of other dp ranks have other documents, and ZeRO-3 gathers weights over the world.
        neighbours = gather(two_documents(pack, layout.sp))[0]
        findings += check_isolation(engine, neighbours, layout, device, TOLERANCE[dtype].leak, vocab_size)
    found = None
    if layout.rank == 0:
        suspects = Suspects(layout, ours.loss)
        found, _ = judge(f"sp {layout.sp} against sp 1", ours, reference, TOLERANCE[dtype], cause=suspects.cause)
    return [*gather(found)[0], *findings]


def raise_if_wrong(findings: list[Finding]) -> None:
    """Raises ModelError (exit 64) with every failed finding."""
    failed = [f for f in findings if f.ok is False]
    if failed:
        lines = [f"  - {f.check}, {f.what}: {f.measured}, allowed {f.tolerance}. {f.note}" for f in failed]
        raise ModelError(
            "train.verify_first: this run would not train what it should:\n"
            + "\n".join(lines)
            + "\nNothing was trained. "
            "`ds-longft verify` with the same config measures more; train.verify_first: false trains regardless."
        )
