"""`ds-longft report RUN`: write the page and the markdown beside the run's files."""

from __future__ import annotations

import json as json_text
import os
import time
from pathlib import Path
from typing import Any

from ds_longft.errors import ConfigError
from ds_longft.tools.report.markdown import markdown_page
from ds_longft.tools.report.page import MOST_RUNS, comparison_page, html_page
from ds_longft.tools.report.run_facts import RunFacts, gather_facts

CARD_MARK = "<!-- ds-longft report -->"


def report(
    run: str, *more: str, out: str | None = None, watch: int = 0, card: bool = False, json: bool = False
) -> None:
    """Write RUN/report.html, one file that opens anywhere without a network, and RUN/report.md with the same facts.

    With several runs: one page that compares them, RUN/compare.html of the first.

    Works for a run that is still going; the page then loads itself again, and with --watch it is made anew.

    Args:
        run: output folder of a training run.
        more: others to compare it with.
        out: another place for the page, e.g. page.html; the markdown goes beside it.
        watch: make it again every N seconds, until the run has ended.
        card: put the markdown at the end of the run's model card (RUN/README.md) as well.
        json: print one JSON object with the paths and the status.
    """
    if watch < 0:
        raise ConfigError(f"--watch is {watch}: expected seconds")
    folder = Path(run).expanduser()
    page = Path(out).expanduser() if out else folder / ("compare.html" if more else "report.html")
    if out and (page.suffix != ".html" or not page.parent.is_dir()):
        raise ConfigError(f"--out is {out}: expected a file .html in a folder that is there")
    if more:
        if len(more) >= MOST_RUNS:
            raise ConfigError(f"{1 + len(more)} runs are given: at most {MOST_RUNS} are compared on a page")
        runs = [gather_facts(Path(one).expanduser()) for one in (run, *more)]
        page.write_text(comparison_page(runs), encoding="utf-8")
        print(f"{page}  {page.stat().st_size / 1024:.0f} KiB ({len(runs)} runs)")
        return
    while True:
        facts = gather_facts(folder)
        write_report(facts, page)
        if not (watch and facts.running):
            break
        time.sleep(watch)
    if card:
        add_to_card(facts, folder / "README.md")
    text = page.with_suffix(".md")
    if json:
        print(json_text.dumps({"page": str(page), "markdown": str(text), "status": facts.status}))
    else:
        print(f"{page}  {page.stat().st_size / 1024:.0f} KiB ({facts.status})\n{text}")


def write_report(facts: RunFacts, page: Path) -> None:
    """Both files, each complete or as before: a browser may be reading."""
    for path, text in ((page, html_page(facts)), (page.with_suffix(".md"), markdown_page(facts))):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def add_to_card(facts: RunFacts, card: Path) -> None:
    """The report behind the model card's own text, a suite's figures as `model-index`; earlier ones are replaced."""
    own = card.read_text(encoding="utf-8").partition(CARD_MARK)[0] if card.is_file() else ""
    card.write_text(f"{own.rstrip()}\n\n{CARD_MARK}\n\n{markdown_page(facts)}", encoding="utf-8")
    for evaluation in facts.evaluations:
        if evaluation.kind == "suite" and evaluation.after is not None:
            _index(card, facts.folder.resolve().name, evaluation.after)


def _index(card: Path, name: str, suite: dict[str, Any]) -> None:
    """Figures where hubs look for them: the card's front matter."""
    from huggingface_hub import EvalResult, ModelCard

    whole = ModelCard.load(card, ignore_metadata_errors=True)
    whole.data.model_name = name
    whole.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=measure["name"].partition(" ")[0].strip(",").lower(),
            dataset_name=measure["name"].removesuffix(", %"),
            metric_type="accuracy" if measure["name"].endswith("%") else "loss",
            metric_value=measure["after"][0],
            metric_name="mean, 95 % {1:g} to {2:g}; before {0:g}".format(measure["before"][0], *measure["after"][1:]),
        )
        for measure in suite["measures"]
    ]
    whole.save(card)
