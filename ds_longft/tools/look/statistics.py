"""`Statistics`: the numbers of a tokenized set and of the packs it will be laid into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds_longft.config.run_config import DataConfig
from ds_longft.data.pack_plan import EQUAL_COST_TOKENS, costs_of, plan_epoch
from ds_longft.data.tokenized import TokenizedSet

WINDOWS = tuple(1 << e for e in range(12, 21))  # 4K to 1M
GROUP_COLUMNS = ("", "rows", "tokens", "median", "longest", "trained", "attention cost")
MAX_KINDS = 12  # of sources or languages told apart; the smallest are counted together
UNKNOWN = "unknown"  # of rows that name none


@dataclass(frozen=True)
class Group:
    """Rows of one source or language."""

    name: str
    rows: int
    tokens: int
    targets: int
    median_tokens: int
    longest_tokens: int
    attention_share: float  # of the attention cost of the whole set

    @property
    def target_share(self) -> float:
        """Share of the tokens that are trained."""
        return self.targets / max(1, self.tokens)

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row of a table behind its name, as `GROUP_COLUMNS` head it."""
        counts = (self.rows, self.tokens, self.median_tokens, self.longest_tokens)
        return (*(f"{n:,}" for n in counts), f"{self.target_share:.1%}", f"{self.attention_share:.1%}")


@dataclass(frozen=True)
class Retention:
    """What a window keeps, of all rows that can be trained on, those left out for their length among them."""

    window_tokens: int
    rows: float  # share
    targets: float  # share


@dataclass(frozen=True)
class Packs:
    """The first epoch's packs."""

    budget_tokens: int
    packing: str
    packs: int
    steps: int
    filled: float  # tokens over the room of all packs; a row longer than the budget fills its own
    documents_per_pack: float
    padding_tokens: int  # to a multiple of sp
    imbalance: float  # cost of the costliest rank over the mean, mean over the steps: 1 where nobody waits
    attention_share: float  # of all work, for a model of `equal_cost_tokens`
    equal_cost_tokens: int


@dataclass(frozen=True)
class PairLengths:
    """Preference pairs: a model that learns from answers of unlike length learns the length too."""

    median_prompt_tokens: int
    median_chosen_tokens: int  # of the answer alone
    median_rejected_tokens: int
    chosen_longer: float  # share of the pairs whose better answer is the longer one

    @classmethod
    def of(cls, rows: TokenizedSet) -> PairLengths | None:
        """None of rows that are no pairs."""
        if rows.documents_per_row == 1:
            return None
        prompt = rows.column("shared_tokens").astype(np.int64)
        chosen, rejected = rows.document_lengths.T
        before, better, worse = (int(np.median(tokens)) for tokens in (prompt, chosen - prompt, rejected - prompt))
        return cls(before, better, worse, float((chosen > rejected).mean()))


@dataclass(frozen=True)
class Statistics:
    """Everything `data stats` shows."""

    total: Group
    sources: list[Group]
    languages: list[Group]
    bounds: list[int]  # upper ends of the length classes, in tokens; they double
    by_source: dict[str, list[int]]  # rows in each length class
    by_language: dict[str, list[int]]
    tokens_by_length: list[int]
    packs: Packs
    pack_tokens: list[int]
    left_out: dict[str, int]  # reason -> rows
    first_left_out: dict[str, str]  # reason -> the first of these rows, and what was seen in it
    truncated: int
    fingerprint: str
    unused: dict[str, int]  # what rows hold and nothing was made of -> rows
    retention: list[Retention]
    pairs: PairLengths | None

    @property
    def rows_by_length(self) -> list[int]:
        """Rows in each length class."""
        return [sum(counts) for counts in zip(*self.by_source.values(), strict=True)]


def statistics(
    rows: TokenizedSet, data: DataConfig, *, dp: int, sp: int, accumulation: int, seed: int,
    equal_cost_tokens: int = EQUAL_COST_TOKENS,
) -> Statistics:  # fmt: skip
    """Count a tokenized set, and plan its first epoch for these ranks and a model of `equal_cost_tokens`."""
    lengths, targets = rows.lengths, rows.targets
    sources = _kinds(rows.column("source"))
    languages = _kinds(rows.column("language"))
    attention = lengths.astype(np.float64) ** 2
    share = attention / attention.sum()
    top = int(np.ceil(np.log2(max(2, int(lengths.max())))))
    bottom = int(np.floor(np.log2(max(1, int(lengths.min())))))
    bounds = [1 << e for e in range(bottom + 1, max(top, bottom + 1) + 1)]
    classes = np.searchsorted(bounds, lengths)
    budget_tokens = data.budget_tokens(rows.documents_per_row)
    plan = plan_epoch(
        lengths, budget_tokens=budget_tokens, dp=dp, accumulation=accumulation, seed=seed, epoch=0,
        packing=data.packing, equal_cost_tokens=equal_cost_tokens,
    )  # fmt: skip

    def group(name: str, where: NDArray[np.bool_]) -> Group:
        own = lengths[where]
        trained, middle, longest = map(int, (targets[where].sum(), np.median(own), own.max()))
        return Group(name, len(own), int(own.sum()), trained, middle, longest, float(share[where].sum()))

    def histogram(kinds: NDArray[Any]) -> dict[str, list[int]]:
        return {k: np.bincount(classes[kinds == k], minlength=len(bounds)).tolist() for k in _by_size(kinds)}

    linear, work = float(lengths.sum()), float(costs_of(lengths, equal_cost_tokens).sum())
    tally = rows.tally
    return Statistics(
        total=group("all", np.ones(len(lengths), dtype=bool)),
        sources=[group(k, sources == k) for k in _by_size(sources)],
        languages=[group(k, languages == k) for k in _by_size(languages)],
        bounds=bounds,
        by_source=histogram(sources),
        by_language=histogram(languages),
        tokens_by_length=np.bincount(classes, weights=lengths, minlength=len(bounds)).astype(int).tolist(),
        packs=Packs(
            budget_tokens=budget_tokens,
            packing=data.packing,
            packs=len(plan.packs),
            steps=len(plan),
            filled=float(plan.pack_tokens.sum() / np.maximum(plan.pack_tokens, budget_tokens).sum()),
            documents_per_pack=len(lengths) / len(plan.packs),
            padding_tokens=int((-plan.pack_tokens % sp).sum()),
            imbalance=float(plan.imbalance().mean()),
            attention_share=(work - linear) / work,
            equal_cost_tokens=equal_cost_tokens,
        ),
        pack_tokens=plan.pack_tokens.tolist(),
        left_out=tally.left_out,
        first_left_out=tally.first,
        truncated=tally.truncated,
        fingerprint=rows.fingerprint,
        unused=tally.unused,
        retention=_retention(rows),
        pairs=PairLengths.of(rows),
    )


def facts(found: Statistics) -> list[tuple[str, str]]:
    """What a terminal and a page say of the packs, and of pairs."""
    packs, pairs = found.packs, found.pairs
    told = [
        (f"packs of up to {packs.budget_tokens:,} tokens", f"{packs.packs:,}"),
        ("filled", f"{packs.filled:.1%}"),
        ("pairs in a pack" if pairs else "documents in a pack", f"{packs.documents_per_pack:.1f}"),
        ("steps per epoch", f"{packs.steps:,}"),
        ("padding tokens", f"{packs.padding_tokens:,}"),
        ("slowest rank over the mean", f"{packs.imbalance:.3f}"),
        (f"attention, share of work (half at {packs.equal_cost_tokens:,} tokens)", f"{packs.attention_share:.0%}"),
        ("rows cut to fit", f"{found.truncated:,}"),
    ]
    if pairs:
        told += [
            ("tokens before an answer, median", f"{pairs.median_prompt_tokens:,}"),
            ("chosen answer, median", f"{pairs.median_chosen_tokens:,} tokens"),
            ("rejected answer, median", f"{pairs.median_rejected_tokens:,} tokens"),
            ("pairs whose chosen answer is longer", f"{pairs.chosen_longer:.0%}"),
        ]
    return told


def kept_in_words(found: Statistics) -> str:
    """Heading of the shares of rows in `retention`: what was cut off rows is not known any more."""
    return f"rows kept whole ({found.truncated:,} as they were cut)" if found.truncated else "rows kept whole"


def _retention(rows: TokenizedSet) -> list[Retention]:
    """From the window that takes the shortest rows to the one that takes all; a pair counts by its longer document."""
    known = [(tokens, targets) for tokens, targets in rows.tally.too_long if tokens]
    own = rows.document_lengths.max(axis=1)
    lengths = np.concatenate([own, [tokens for tokens, _ in known]])
    targets = np.concatenate([rows.targets, [trained for _, trained in known]])
    top = int(np.ceil(np.log2(max(lengths.max(), WINDOWS[0]))))
    windows = [w for w in WINDOWS if w < 1 << top] + [1 << top]
    return [
        Retention(w, float((lengths <= w).mean()), float(targets[lengths <= w].sum() / targets.sum())) for w in windows
    ]


def _kinds(values: NDArray[Any]) -> NDArray[Any]:
    """One name a row: the largest `MAX_KINDS` - 1 as they are, the rest as "others"; paths by their last part."""
    names = np.asarray([str(v).rstrip("/").rpartition("/")[2] if v is not None else UNKNOWN for v in values])
    kinds, counts = np.unique(names, return_counts=True)
    if len(kinds) > MAX_KINDS:
        small = kinds[np.argsort(-counts)[MAX_KINDS - 1 :]]
        names = np.where(np.isin(names, small), "others", names)
    return names


def _by_size(kinds: NDArray[Any]) -> list[str]:
    names, counts = np.unique(kinds, return_counts=True)
    return [str(names[i]) for i in np.argsort(-counts, kind="stable")]
