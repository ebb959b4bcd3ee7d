"""The statistics of a data set as one HTML file that needs nothing else: tables, and the picture inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from ds_longft.tools.look.figure import png
from ds_longft.tools.look.statistics import Group, Statistics, kept_in_words

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p.dim { color: var(--dim); margin: .75rem 0 }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }
.facts div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem }
.facts b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums } .facts span { color: var(--dim) }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
td, th { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
td:first-child, th { min-width: 5rem } .facts b, td { overflow-wrap: normal }
img { width: 100%; min-width: 44rem; background: #fff; border-radius: .5rem } .scroll { overflow-x: auto }
"""


def page(stats: Statistics, *, title: str, note: str = "") -> str:
    """The whole HTML text."""
    total, packs = stats.total, stats.packs
    facts = [
        ("rows", f"{total.rows:,}"),
        ("tokens", f"{total.tokens:,}"),
        ("trained", f"{total.target_share:.1%}"),
        ("longest row", f"{total.longest_tokens:,}"),
        ("packs", f"{packs.packs:,}"),
        ("filled", f"{packs.filled:.1%}"),
        ("padding tokens", f"{packs.padding_tokens:,}"),
        ("steps per epoch", f"{packs.steps:,}"),
        ("slowest rank / mean", f"x {packs.imbalance:.3f}"),
        ("work in attention", f"{packs.attention_share:.0%}"),
        *([("rows cut to fit", f"{stats.truncated:,}")] if stats.truncated else []),
    ]
    cards = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in facts)
    picture = base64.b64encode(png(stats)).decode()
    first = stats.first_left_out
    left_out = [(escape(r), f"{count:,}", escape(first.get(r, ""))) for r, count in stats.left_out.items()]
    unused = [(escape(what), f"{count:,}") for what, count in stats.unused.items()]
    kept = [(f"{w.window_tokens:,}", f"{w.rows:.1%}", f"{w.targets:.1%}") for w in stats.retention]
    lengths = [
        (f"{bound:,}", *(f"{counts[i]:,}" for counts in stats.by_source.values()), f"{tokens:,}")
        for i, (bound, tokens) in enumerate(zip(stats.bounds, stats.tokens_by_length, strict=True))
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f'<h1>{escape(title)}</h1><p class="dim">{escape(note)}</p>',
            f'<div class="facts">{cards}</div>',
            '<div class="scroll"><img alt="lengths, sources, languages, packs" '
            f'src="data:image/png;base64,{picture}"></div>',
            _section("Sources", _groups(stats.sources)),
            _section("Languages", _groups(stats.languages)),
            _section("Lengths: rows", _table(["tokens up to", *map(escape, stats.by_source), "tokens"], lengths)),
            _section("What a window keeps", _table(["tokens", kept_in_words(stats), "targets in them"], kept)),
            _section("Not used, though the rows hold it", _table(["", "rows"], unused)) if unused else "",
            _section("Rows left out", _table(["reason", "rows", "first of them"], left_out)) if left_out else "",
            '<p class="dim">Attention cost: sum of squared lengths. Work in attention: for a model whose attention '
            f"costs as much as its linear layers at {packs.equal_cost_tokens:,} tokens. "
            f"Fingerprint {escape(stats.fingerprint)}.</p>",
            "</html>",
        ]
    )


def _section(title: str, content: str) -> str:
    return f'<h2>{escape(title)}</h2><div class="scroll">{content}</div>'


def _groups(groups: Sequence[Group]) -> str:
    head = ["", "rows", "tokens", "median", "longest", "trained", "attention cost"]
    rows = [
        (
            escape(g.name),
            f"{g.rows:,}",
            f"{g.tokens:,}",
            f"{g.median_tokens:,}",
            f"{g.longest_tokens:,}",
            f"{g.target_share:.1%}",
            f"{g.attention_share:.1%}",
        )
        for g in groups
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
