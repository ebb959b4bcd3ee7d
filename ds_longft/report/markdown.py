"""The same facts as markdown, for the model card on a hub."""

from __future__ import annotations

from collections.abc import Sequence

from ds_longft.report.facts import RunFacts
from ds_longft.report.page import TITLES
from ds_longft.report.tables import (
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
    parts = [f"## Training report\n\n{facts.status}\n\n" + _pairs([*overview(facts), *progress(facts)])]
    parts += facts.unreadable
    if facts.versions:
        parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in facts.versions.items()))
    for name, statistics in facts.data.items():
        parts.append(f"### Data: {name}\n\n" + _pairs(data_rows(statistics)))
    for evaluation in facts.evaluations:
        title = TITLES.get(evaluation.kind, evaluation.kind)
        name = title if evaluation.name == evaluation.kind else f"{title}: {evaluation.name}"
        columns, rows = evaluation_rows(evaluation)
        made = "\n".join(f"- {label}: {result['model']}; {settings_line(result)}" for label, result in evaluation.pair)
        parts += [f"### {name}", differences_line(evaluation), _table(columns, rows), made]
    parts.append("### Again\n\n```\n" + "\n".join(reproduce(facts)) + "\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _pairs(pairs: Pairs) -> str:
    return _table(["", ""], [list(pair) for pair in pairs])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *map(line, rows)])
