"""The picture of a data set: lengths by source and language, where the tokens are, how full the packs are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from ds_longft.tools.look.statistics import Group, Statistics

# Okabe and Ito's colours, told apart by colour-blind readers too; then greys.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
GREYS = ("#666666", "#888888", "#aaaaaa", "#cccccc")
NAME_CHARS = 36


def png(stats: Statistics, *, dpi: int = 110) -> bytes:
    """The whole picture as a PNG file."""
    from matplotlib import rc_context  # seconds, and not needed for `--help`

    out = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # a dollar sign in a name begins no formula
        draw(stats).savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def draw(stats: Statistics) -> Any:
    """A matplotlib figure of six panels."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 11), layout=ConstrainedLayoutEngine(h_pad=0.14, w_pad=0.1))
    axes = figure.subplots(3, 2)
    labels = [_short(bound) for bound in stats.bounds]
    _stacked(axes[0, 0], labels, stats.by_source, "rows by length and source")
    _stacked(axes[0, 1], labels, stats.by_language, "rows by length and language")
    _tokens(axes[1, 0], stats, labels)
    _shares(axes[1, 1], stats.sources)
    _packs(axes[2, 0], stats)
    _targets(axes[2, 1], stats.sources)
    return figure


def _stacked(axis: Any, labels: Sequence[str], kinds: dict[str, list[int]], title: str) -> None:
    below = np.zeros(len(labels))
    for i, (name, counts) in enumerate(kinds.items()):
        axis.bar(labels, counts, 0.85, bottom=below, label=_cut(name), color=_colour(i))
        below += counts
    # A limit of its own: bars of no height on top of a stack would be taken for its edge, and leave no air above it.
    axis.set(title=title, xlabel="tokens up to", ylabel="rows", ylim=(0, 1.06 * below.max()))
    axis.legend(fontsize=8, frameon=False)
    _plain(axis)


def _tokens(axis: Any, stats: Statistics, labels: Sequence[str]) -> None:
    """Tokens against attention cost: the few long rows are most of the work."""
    rows = np.sum(list(stats.by_source.values()), axis=0)
    total_tokens = max(1, sum(stats.tokens_by_length))
    mean = np.divide(stats.tokens_by_length, np.maximum(rows, 1))
    attention = rows * mean**2
    places = np.arange(len(labels))
    for offset, values, name, colour in (
        (-0.28, rows / rows.sum(), "rows", GREYS[2]),
        (0.0, np.asarray(stats.tokens_by_length) / total_tokens, "tokens", COLOURS[0]),
        (0.28, attention / attention.sum(), "attention cost", COLOURS[5]),
    ):
        axis.bar(places + offset, 100 * values, 0.27, label=name, color=colour)
    axis.set(title="where the work is", xlabel="tokens up to", ylabel="% of the set", xticks=places)
    axis.set_xticklabels(labels)
    axis.legend(fontsize=8, frameon=False)
    _plain(axis)


def _shares(axis: Any, groups: Sequence[Group]) -> None:
    total = sum(group.tokens for group in groups)
    names = [_cut(group.name) for group in groups]
    places = np.arange(len(names))
    axis.barh(places - 0.2, [100 * g.tokens / total for g in groups], 0.38, label="tokens", color=COLOURS[0])
    axis.barh(places + 0.2, [100 * g.attention_share for g in groups], 0.38, label="attention cost", color=COLOURS[5])
    axis.set(title="share of each source", xlabel="%", yticks=places)
    axis.set_yticklabels(names)
    axis.invert_yaxis()
    axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))  # bars may reach every corner
    _plain(axis)


def _packs(axis: Any, stats: Statistics) -> None:
    packs = stats.packs
    fill = np.minimum(100, 100 * np.asarray(stats.pack_tokens) / packs.budget_tokens)  # long rows fill theirs
    axis.hist(fill, bins=np.linspace(0, 100, 41), color=COLOURS[2])
    axis.set(
        title=f"packs of {packs.budget_tokens:,} tokens ({packs.packing}): {packs.packs:,}, {packs.filled:.1%} full",
        xlabel="% of a pack filled",
        ylabel="packs",
    )
    axis.yaxis.get_major_locator().set_params(integer=True)
    _plain(axis)


def _targets(axis: Any, groups: Sequence[Group]) -> None:
    places = np.arange(len(groups))
    shares = [100 * group.target_share for group in groups]
    axis.barh(places, shares, 0.7, color=COLOURS[3])
    for place, share in zip(places, shares, strict=True):
        axis.text(share, place, f" {share:.1f}", va="center", fontsize=8)
    axis.set(title="tokens that are trained", xlabel="% of the tokens", yticks=places)
    axis.set_yticklabels([_cut(group.name) for group in groups])
    axis.invert_yaxis()
    axis.margins(x=0.1)
    _plain(axis)


def _colour(i: int) -> str:
    palette = (*COLOURS, *GREYS)
    return palette[i % len(palette)]


def _cut(name: str) -> str:
    """A name that leaves room for the picture: the page's tables have all of it."""
    name = " ".join(name.split())
    return name if len(name) <= NAME_CHARS else f"{name[: NAME_CHARS // 2]}…{name[-NAME_CHARS // 2 :]}"


def _short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K" if tokens >= 1 << 10 else str(tokens)


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
