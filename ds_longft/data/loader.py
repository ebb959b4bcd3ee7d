"""`StepLoader`: the optimizer steps of an epoch as one data-parallel rank trains them, built ahead by a thread."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ds_longft.batch import Pack, Step
from ds_longft.config.data_keys import DataConfig
from ds_longft.data.deal import deal_documents
from ds_longft.data.pack import filler_pack
from ds_longft.data.pack_plan import EQUAL_COST_TOKENS, PackPlan, plan_epoch
from ds_longft.data.tokenized import TokenizedSet

STEPS_AHEAD = 3


class StepLoader:
    """Steps of one data-parallel rank. All sp ranks of it make a loader with the same arguments and get equal packs.

    Nothing is communicated: the plan, and with it every number about the whole step, is the same on every rank.
    """

    def __init__(
        self,
        tokenized: TokenizedSet,
        *,
        data: DataConfig,
        dp: int,
        dp_rank: int,
        sp: int,
        accumulation: int,
        seed: int,
        pad_id: int = 0,
        equal_cost_tokens: int = EQUAL_COST_TOKENS,
    ) -> None:
        """Reads budget, packing and weighting of `data`. `sp` decides the padding, and the order in a pack.

        `equal_cost_tokens`: length at which attention costs the model as much as its linears (`plan.costs_of`).
        """
        self.wait_s = 0.0
        """Seconds spent waiting for a step to be built, since the loader was made."""
        self.budget_tokens = data.budget_tokens(tokenized.documents_per_row)
        """Tokens of a full pack."""
        self._data = data
        self._dp, self._dp_rank, self._sp, self._accumulation = dp, dp_rank, sp, accumulation
        self._seed, self._pad_id, self._equal_cost_tokens = seed, pad_id, equal_cost_tokens
        self._take(tokenized)

    def _take(self, tokenized: TokenizedSet) -> None:
        self._tokenized = tokenized
        self._row_weights: NDArray[np.float64] = tokenized.weight_sums(self._data.weighting)
        self._plans: dict[int, PackPlan] = {}

    @property
    def _content(self) -> str:
        return self._tokenized.content

    def rows(self, epoch: int) -> TokenizedSet:
        """The rows of an epoch."""
        return self._tokenized

    def rows_name(self, epoch: int) -> str:
        """Names the rows of an epoch by what is trained of them."""
        return self._content

    @property
    def fingerprint(self) -> str:
        """Names the steps: equal on every rank, for any sp, and for any dp and accumulation of equal product."""
        data = self._data
        step = (self._dp * self._accumulation, self._seed, self._equal_cost_tokens)
        settings = (self.budget_tokens, data.packing, data.weighting, *step)
        return hashlib.sha256(repr((self._content, *settings)).encode()).hexdigest()[:16]

    def plan(self, epoch: int) -> PackPlan:
        """The plan of an epoch. The last one asked for is kept."""
        if epoch not in self._plans:
            self._plans = {
                epoch: plan_epoch(
                    self.rows(epoch).lengths,
                    budget_tokens=self.budget_tokens,
                    dp=self._dp,
                    accumulation=self._accumulation,
                    seed=self._seed,
                    epoch=epoch,
                    packing=self._data.packing,
                    equal_cost_tokens=self._equal_cost_tokens,
                )
            }
        return self._plans[epoch]

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch; may differ by a few from one epoch to the next."""
        return len(self.plan(epoch))

    def origin(self, row: int) -> str:
        """Where a row came from: file:line."""
        return self._tokenized.row(row).origin

    def fullest_pack(self, epoch: int, *, of_a_side: bool = False) -> Pack:
        """The pack with the most tokens of an epoch, for finding out what fits.

        `of_a_side`: the pack of pairs whose chosen, or whose rejected documents have the most tokens together. What two
        passes hold at once is one side, and the longest pair need not have the longest answer.
        """
        plan, tokens = self.plan(epoch), self.plan(epoch).pack_tokens
        if of_a_side:
            sides = self._tokenized.document_lengths
            tokens = np.asarray([sides[rows].sum(axis=0).max() for rows in plan.packs])
        return self._pack(plan, int(np.argmax(tokens)), None)  # split even where it could be dealt: that needs more

    def steps(self, epoch: int, start: int = 0) -> Generator[Step]:
        """Steps `start`, `start + 1`, ... of an epoch, built a few steps ahead.

        What fails in the thread is raised here; the thread ends when the iterator is closed or used up.
        """
        plan = self.plan(epoch)
        ahead: deque[Future[Step]] = deque()
        numbers = iter(range(start, len(plan)))
        pool = ThreadPoolExecutor(1, thread_name_prefix="ds_longft-loader")
        try:
            while True:
                for index in islice(numbers, STEPS_AHEAD + 1 - len(ahead)):
                    ahead.append(pool.submit(self._build, plan, epoch, index))
                if not ahead:
                    return
                before_s = time.perf_counter()
                step = ahead.popleft().result()
                self.wait_s += time.perf_counter() - before_s
                yield step
        finally:
            pool.shutdown(cancel_futures=True)

    def _build(self, plan: PackPlan, epoch: int, index: int) -> Step:
        numbers = plan.packs_of_step(index)
        fillers = self._dp * self._accumulation - len(numbers)
        rows = np.concatenate([plan.packs[number] for number in numbers])
        tokens = plan.pack_tokens[numbers.start : numbers.stop]
        dealt = {number: self._dealt(plan, number) for number in numbers}
        padding = sum(-int(plan.pack_tokens[number]) % self._sp for number in numbers if dealt[number] is None)
        return Step(
            epoch=epoch,
            index=index,
            packs=tuple(
                filler_pack(self._sp, self._pad_id) if number is None else self._pack(plan, number, dealt[number])
                for number in plan.step(index)[self._dp_rank]
            ),
            total_weight=float(self._row_weights[rows].sum()),
            tokens=int(tokens.sum()),
            padding_tokens=padding + fillers * self._sp,
        )

    def _dealt(self, plan: PackPlan, number: int) -> list[list[int]] | None:
        """Which rows of a pack each sp rank holds whole, by their place in it; None where documents are split."""
        if self._sp == 1 or self._tokenized.documents_per_row > 1:
            return None
        most = -(-int(plan.pack_tokens.max()) // self._sp)  # what a rank has of the fullest pack
        lengths = self._tokenized.lengths[plan.packs[number]]
        return deal_documents(lengths, self._sp, most, self._equal_cost_tokens)

    def _pack(self, plan: PackPlan, number: int, dealt: list[list[int]] | None) -> Pack:
        """`dealt`: see `_dealt`."""
        rows = plan.packs[number].tolist()
        if dealt is not None:
            rows = [rows[i] for of_rank in dealt for i in of_rank]
        pack = self._tokenized.pack(
            rows, pad_to_multiple=1 if dealt else self._sp, pad_id=self._pad_id, weighting=self._data.weighting
        )
        if dealt is None:
            return pack
        ends = np.cumsum([len(of_rank) for of_rank in dealt])
        return replace(pack, rank_borders=(0, *(int(pack.cu_seqlens[end]) for end in ends)))
