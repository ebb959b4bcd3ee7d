"""The same facts as markdown, for the model card on a hub."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ds_longft.tools.report.run_facts import RunFacts
from ds_longft.tools.report.tables import (
    Pairs,
    data_rows,
    differences_line,
    evaluation_rows,
    overview,
    progress,
    reproduce,
    settings_line,
)


def markdown_page(facts: RunFacts) -> str:
    """Run, training, data, evaluations and commands; curves stay in the page."""
    parts = [f"## Training report\n\n{_plain(facts.status)}\n\n" + _pairs([*overview(facts), *progress(facts)])]
    parts += map(_plain, facts.unreadable)
    if facts.versions:
        parts.append(_plain("Versions: " + ", ".join(f"{name} {number}" for name, number in facts.versions.items())))
    for name, statistics in facts.data.items():
        parts.append(f"### Data: {_plain(name)}\n\n" + _pairs(data_rows(statistics)))
    for evaluation in facts.evaluations:
        columns, rows = evaluation_rows(evaluation)
        made = [_plain(f"- {label}: {result['model']}; {settings_line(result)}") for label, result in evaluation.pair]
        parts += [
            f"### {_plain(evaluation.title)}",
            _plain(differences_line(evaluation)),
            _table(columns, rows),
            "\n".join(made),
        ]
    parts.append("### Reproduce\n\n```\n" + "\n".join(reproduce(facts)) + "\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Text as text, on one line: names and replies are data, and some viewers run HTML."""
    return escape(" ".join(text.splitlines()), quote=False)


def _pairs(pairs: Pairs) -> str:
    return _table(["", ""], [list(pair) for pair in pairs])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])
