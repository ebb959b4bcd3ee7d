"""Label borders: no target crosses a document, none is lost on the way to the ranks, the divisor counts them all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ds_longft.batch import IGNORE_INDEX, Pack
from ds_longft.exactness.finding import Finding, Gather
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.shard import shard

CHECK = "3 label borders"


def check_labels(packs: Sequence[Pack], total_weight: float, layout: ParallelLayout, gather: Gather) -> list[Finding]:
    """Judge this dp rank's packs of one step as the data made them, and the slices of them that the ranks train.

    `total_weight`: what the loss of the step is divided by. Collective; the findings are the same on every rank.
    """
    counts = gather(_count(packs, layout))
    none = Counter[str]()
    of_packs, count = sum(counts[:: layout.sp], none), sum(counts, none)  # of each dp rank, of all ranks
    targets, crossing, shifted = of_packs["targets"], of_packs["crossing"], of_packs["not_next"]
    trained, wrong, weight = count["trained"], count["wrong"], count["trained_weight"]
    astray = max(count["astray"], abs(targets - trained))  # one lost and one doubled are two
    lost = abs(weight - total_weight) / max(abs(total_weight), 1e-30)
    judged = partial(Finding.judged, CHECK)
    leaking = (
        f"{crossing:,} labels leak over a document border: the last token of a document is trained to predict the "
        "first of the next. Labels have to be shifted inside each document"
    )
    unshifted = "labels are not shifted by one token inside their document"
    off = (
        f"{astray:,} targets are lost or doubled and {wrong:,} tokens, targets or weights differ when a pack is sliced "
        "over the ranks"
    )
    uncounted = (
        f"the ranks train a weight of {weight:.6g}, the loss is divided by {total_weight:.6g}: targets were lost or "
        "added after the data was counted"
    )
    first = "targets that are the first token of another document"
    next_token = "labels that are not the token after theirs"
    once, of_all = "targets of the packs, trained by exactly one rank", f"{trained:,} of {targets:,}"
    return [
        judged(first, crossing == 0, f"{crossing:,}", "0", leaking, value=crossing),
        judged(next_token, shifted == 0, f"{shifted:,} of {targets:,}", "0", unshifted, value=shifted),
        judged(once, astray == 0 and wrong == 0, of_all, "all, once", off, value=astray),
        Finding.at_most(CHECK, "sum of trained weights against the loss's divisor", lost, 1e-5, uncounted),
    ]


def _count(packs: Sequence[Pack], layout: ParallelLayout) -> Counter[str]:
    """What this rank sees: of the whole packs, and of its own slices."""
    count: Any = Counter()  # a sum of weights too
    for pack in packs:
        trained = (pack.labels != IGNORE_INDEX) & (pack.loss_weights != 0)
        last = pack.cu_seqlens[1:] - 1  # of each document
        following = np.append(pack.input_ids[1:], IGNORE_INDEX)
        inside = trained.copy()
        inside[last] = False
        count["targets"] += int(trained.sum())
        count["crossing"] += int(trained[last].sum())
        count["not_next"] += int((pack.labels[inside] != following[inside]).sum())
        batch = shard(pack, layout, torch.device("cpu"))
        mine = pack.part(layout.sp, layout.sp_rank)
        rows = batch.target_rows.numpy() + mine.start
        count["trained"] += len(rows)
        mine_once = np.zeros(pack.tokens, dtype=np.int64)
        mine_once[mine] = trained[mine]
        count["astray"] += int(np.abs(np.bincount(rows, minlength=pack.tokens) - mine_once).sum())
        count["wrong"] += int((batch.targets.numpy() != pack.labels[rows]).sum())
        count["wrong"] += int((batch.target_weights.numpy() != pack.loss_weights[rows]).sum())
        count["wrong"] += int((batch.input_ids.numpy()[0] != pack.input_ids[mine]).sum())
        if pack.pairs is None:
            count["trained_weight"] += float(batch.target_weights.double().sum())
        else:  # a pair counts by its own weight, and is trained by all ranks of a group together
            count["trained_weight"] += float(pack.pairs.weights.sum(dtype=np.float64)) / layout.sp
    return count
