"""The statistics of a data set as one HTML file that needs nothing else: tables, and the pictures inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds_longft.tools.look.statistics import GROUP_COLUMNS, UNKNOWN, Group, Statistics, facts, kept_in_words
from ds_longft.tools.pages.charts import column_chart
from ds_longft.tools.pages.shell import facts_table, shell, table, tiles, wide


def page(stats: Statistics, *, title: str, note: str = "") -> str:
    """The whole HTML text."""
    total = stats.total
    first = [
        ("rows", f"{total.rows:,}"),
        ("tokens", f"{total.tokens:,}"),
        ("trained", f"{total.target_share:.1%}"),
        ("longest row", f"{total.longest_tokens:,} tokens"),
        *facts(stats),
    ]
    seen = stats.first_left_out
    left_out = [(reason, f"{count:,}", seen.get(reason, "")) for reason, count in stats.left_out.items()]
    unused = [(what, f"{count:,}") for what, count in stats.unused.items()]
    kept = [(f"{w.window_tokens:,}", f"{w.rows:.1%}", f"{w.targets:.1%}") for w in stats.retention]
    lengths = [
        (f"{bound:,}", *(f"{counts[i]:,}" for counts in stats.by_source.values()), f"{tokens:,}")
        for i, (bound, tokens) in enumerate(zip(stats.bounds, stats.tokens_by_length, strict=True))
    ]
    made = [
        ("attention cost", "sum of squared lengths"),
        ("fingerprint", stats.fingerprint),
    ]
    languages = [group.name for group in stats.languages]
    sections = [
        ("Overview", f"{tiles(first)}<div class=pair>{_charts(stats)}</div>"),
        ("Sources", _groups(stats.sources, "Rows by source")),
        ("Languages", _groups(stats.languages, "Rows by language") if languages != [UNKNOWN] else ""),
        ("Lengths", _wide(["tokens up to", *stats.by_source, "tokens"], lengths, "Rows by length and source")),
        ("Windows", _wide(["tokens", kept_in_words(stats), "targets in them"], kept, "What a window keeps")),
        ("Not used", _wide(["", "rows"], unused, "What rows hold and nothing is made of") if unused else ""),
        ("Left out", _wide(["reason", "rows", "first of them"], left_out, "Rows left out") if left_out else ""),
        ("How it was counted", facts_table(made)),
    ]
    return shell(title, note, "", sections)


def _charts(stats: Statistics) -> str:
    labels = [_short(bound) for bound in stats.bounds]
    length = "tokens up to"
    rows = np.asarray(stats.rows_by_length)
    cost = rows * np.divide(stats.tokens_by_length, np.maximum(rows, 1)) ** 2
    shares = [
        (what, (100 * np.asarray(amounts) / max(1, np.sum(amounts))).tolist())
        for what, amounts in (("rows", rows), ("tokens", stats.tokens_by_length), ("attention cost", cost))
    ]
    packs = stats.packs
    fill = np.minimum(100, 100 * np.asarray(stats.pack_tokens) / packs.budget_tokens)  # long rows fill theirs
    full = np.histogram(fill, bins=np.linspace(0, 100, 21))[0].tolist()
    by_kind = [
        column_chart(labels, list(kinds.items()), name=name, x_label=length, y_label="rows", stacked=True)
        for name, kinds in (("Rows by source", stats.by_source), ("Rows by language", stats.by_language))
        if len(kinds) > 1
    ]
    return "".join(
        [
            column_chart(labels, shares, name="Where the work is", x_label=length, y_label="% of the set"),
            *by_kind,
            column_chart(
                [f"{5 * i + 5}" for i in range(20)], [("packs", full)], name="How full packs are",
                x_label="% filled, up to", y_label=f"packs of {packs.budget_tokens:,} tokens ({packs.packing})",
            ),
        ]
    )  # fmt: skip


def _wide(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    return wide(table(columns, rows, caption), caption)


def _groups(groups: Sequence[Group], caption: str) -> str:
    return _wide(GROUP_COLUMNS, [(group.name, *group.cells) for group in groups], caption)


def _short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K" if tokens >= 1 << 10 else str(tokens)
