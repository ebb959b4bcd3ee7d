"""How long an epoch of a run takes, from the packs that its rows make: known once the rows are tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from ds_longft.config.read import load_run_config
from ds_longft.data.pack_plan import costs_of, plan_epoch
from ds_longft.data.progress import duration
from ds_longft.data.tokenize import tokenized_already
from ds_longft.decide.search import Plan
from ds_longft.errors import LongftError
from ds_longft.model.facts import ModelFacts
from ds_longft.model.read_model import load_tokenizer


def epoch_in_words(words: Sequence[str], found: Plan, model: ModelFacts) -> list[str]:
    """`an epoch is 1,679 steps, about 5.7 hours`; how to learn it, where rows lie here that nobody has tokenized.

    Of a plan whose step is one of full packs. A pack of shorter documents takes less, as its attention does.
    """
    run, x = load_run_config(words), found.setting
    here = bool(run.data.train) and all(Path(source.path).expanduser().exists() for source in run.data.train)
    if not here or run.data.stream_window_mib is not None:
        return []
    with suppress(LongftError):  # rows that cannot be trained on are refused by a start; a plan is of memory and time
        rows = tokenized_already(run.data.train, load_tokenizer(run.model), run.data, pairs=run.objective == "dpo")
        if rows is None:
            return [f"how long an epoch takes is known once `ds-longft data tokenize {words[0]}` has counted the rows"]
        lengths = rows.lengths[rows.lengths > 0][: round(len(rows) * (1 - run.data.eval_fraction))]
        cost_tokens = model.equal_cost_tokens(lora=run.lora is not None)
        plan = plan_epoch(
            lengths, budget_tokens=run.budget_tokens, dp=x.dp, accumulation=x.accumulation, seed=run.seed, epoch=0,
            packing=run.data.packing, equal_cost_tokens=cost_tokens,
        )  # fmt: skip
        documents = np.full(rows.documents_per_row, run.budget_tokens // rows.documents_per_row)
        of_full = costs_of(documents, cost_tokens).sum() * len(plan.packs)
        share = float(costs_of(rows.document_lengths[: len(lengths)].ravel(), cost_tokens).sum() / of_full)
        step_s = x.accumulation * found.time.total_s * share
        return [f"an epoch is {len(plan):,} steps of {step_s:.3g} s on average, about {duration(len(plan) * step_s)}"]
    return []
