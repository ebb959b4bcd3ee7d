"""Forward and backward of a pack of preference pairs, in one pass or in two.

One pass: the reference without gradient, the model with its graph, then one backward pass of
sum(dL/dlogp * logp) over this rank's own share of every document's log-probability. The derivatives are known from the
all-reduced sums; nothing differentiable is communicated.

Two passes: the log-probabilities without a graph, then the chosen documents forward and backward alone, then the
rejected ones. The same numbers in another order, with the activations of one side at a time.

Every rank makes the same number of forward passes whatever its pack holds, as ZeRO-3 needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ds_longft.batch import IGNORE_INDEX, Batch, Pack, Pairs
from ds_longft.data.pairs import pair_sides
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.pair_loss import PairLosses, pair_losses
from ds_longft.sequence.shard import shard


def backpropagate_pairs(engine: Any, pack: Pack, scale: float, layout: ParallelLayout, device: torch.device) -> Tensor:
    """Forward and backward of one pack of pairs, one micro-step of the engine.

    Returns this rank's share of the pack's weighted sums, [1 + metrics] float64: the loss, then `METRICS`. A loss that
    is not finite makes all of the gradient NaN.
    """
    run = _Run.of(engine, pack, layout, device)
    reference = run.reference()
    if engine.module.passes == "one":
        mine = run.both()  # with the graph
        pairs = run.losses(mine.detach(), reference)
        engine.backward((mine * run.coefficients(pairs, scale)).sum().float(), scale_wrt_gas=False)
    else:
        with torch.no_grad():
            pairs = run.losses(run.both(), reference)
        coefficients = run.coefficients(pairs, scale)
        with _two_backwards(engine) as boundary:
            for side, batch in enumerate(run.batches):
                boundary(side)
                mine = run.documents(batch)  # with the graph of this side
                engine.backward((mine * coefficients[:, side]).sum().float(), scale_wrt_gas=False)
                del mine
    return run.share(pairs)


@torch.no_grad()
def evaluate_pairs(engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> Tensor:
    """The same sums without a gradient."""
    run = _Run.of(engine, pack, layout, device)
    reference = run.reference()
    return run.share(run.losses(run.both(), reference))


@torch.no_grad()
def reference_logps(engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> Tensor:
    """[P, 2] log-probabilities of the model before training, whole on every rank of the sp group."""
    run = _Run.of(engine, pack, layout, device)
    return _summed(torch.stack([run.both(of_reference=True)]), layout)[0]


@dataclass(frozen=True)
class _Run:
    """A pack on its way through the engine: as one batch, or as one for each side of the pairs."""

    engine: Any
    pairs: Pairs
    layout: ParallelLayout
    batches: Sequence[Batch]
    weights: Tensor  # [P] float64
    lengths: Tensor  # [P, 2] float64, trained tokens

    @classmethod
    def of(cls, engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> _Run:
        pairs = pack.pairs or Pairs(np.zeros(0, dtype=np.float32))  # a pack of padding alone has none
        packs = [pack] if engine.module.passes == "one" else list(pair_sides(pack, layout.sp))
        batches = [shard(p, layout, device, by_document=True) for p in packs]
        trained = ((pack.labels != IGNORE_INDEX) & (pack.loss_weights != 0)).astype(np.float64)
        counts = np.add.reduceat(trained, pack.cu_seqlens[:-1])[: 2 * len(pairs)].reshape(-1, 2)
        weights = torch.from_numpy(pairs.weights.astype(np.float64)).to(device)
        return cls(engine, pairs, layout, batches, weights, torch.from_numpy(np.maximum(counts, 1.0)).to(device))

    def documents(self, batch: Batch, *, of_reference: bool = False) -> Tensor:
        """This rank's share of the log-probabilities of a batch's documents, padding left out."""
        count = 2 * len(self.weights) // len(self.batches)
        return -self.engine(batch, of_reference=of_reference)[:count]

    def both(self, *, of_reference: bool = False) -> Tensor:
        """[P, 2] this rank's share of both documents' log-probabilities, with a graph unless gradients are off."""
        parts = [self.documents(batch, of_reference=of_reference) for batch in self.batches]
        return parts[0].view(-1, 2) if len(parts) == 1 else torch.stack(parts, dim=1)

    def reference(self) -> Tensor | None:
        """[P, 2] this rank's share of the reference's, or all of it where it was precomputed; None without one."""
        objective = self.engine.module
        if objective.reference == "precomputed":
            known = self.pairs.reference
            assert known is not None or not len(self.weights), "the loader has no precomputed log-probabilities"
            return torch.from_numpy(np.zeros((0, 2)) if known is None else known).to(self.weights.device)
        if not objective.live_reference:
            return None
        with torch.no_grad():
            return self.both(of_reference=True)

    def losses(self, policy: Tensor, reference: Tensor | None) -> PairLosses:
        """The pairs' losses; one all-reduce over the sp group."""
        objective = self.engine.module
        if objective.live_reference:
            assert reference is not None
            policy, reference = _summed(torch.stack([policy, reference]), self.layout).unbind(0)
        else:
            policy = _summed(policy.clone(), self.layout)
        return pair_losses(policy, reference, self.lengths, objective.dpo)

    def coefficients(self, pairs: PairLosses, scale: float) -> Tensor:
        """[P, 2] what each document's log-probability is multiplied with before the backward pass."""
        total = pairs.losses @ self.weights
        # As a tensor of float64: torch.where makes float32 of a Python number.
        scales = torch.where(total.isfinite(), total.new_full((), scale), math.nan)
        return pairs.gradient * self.weights[:, None] * scales

    def share(self, pairs: PairLosses) -> Tensor:
        """[1 + metrics] such that the sum over the ranks of an sp group is the pack's."""
        return pairs.sums(self.weights) / self.layout.sp


def _summed(shares: Tensor, layout: ParallelLayout) -> Tensor:
    """Sum over the sp group, in place."""
    if layout.group is not None:
        dist.all_reduce(shares, group=layout.group)
    return shares


@contextmanager
def _two_backwards(engine: Any) -> Iterator[Callable[[int], None]]:
    """Two backward passes in one micro-step: the first one ends no accumulation, the second what it would have ended.

    DeepSpeed's documented way to call `step()` once after several backward passes. Yields what is called before each.
    """
    held, last = engine._is_gradient_accumulation_boundary, engine.is_gradient_accumulation_boundary()
    try:
        yield lambda side: engine.set_gradient_accumulation_boundary(side == 1 and last)
    finally:
        engine.set_gradient_accumulation_boundary(held)
