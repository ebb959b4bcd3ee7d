"""`ds-longft eval needle`: does the model find a fact, wherever in a long text it stands?

A grid of lengths x depths; every cell is asked some times with other names, numbers and text. The model generates its
answer, and only the right number counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.table import Table

from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.flags import FLAGS, Flags, listed, print_tables, token_list
from ds_longft.tools.evaluate.grid import (
    ANSWER_TOKENS,
    Ask,
    Grid,
    default_lengths,
    judged,
    samples,
    spread,
    summarize,
)
from ds_longft.tools.evaluate.haystack import Haystack, Prompt, build_prompt
from ds_longft.tools.evaluate.needle_facts import Form, Needle, make_needle
from ds_longft.tools.evaluate.processes import evaluate_on_ranks
from ds_longft.tools.evaluate.texts import CHARACTERS_A_TOKEN, Language, read_texts

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering, Result

MAX_FACTS = 16


def needle(
    model: str,
    *,
    lengths: str | None = None,
    depths: str = "0,25,50,75,100",
    trials: int = 4,
    languages: str = "en",
    form: Form = "single",
    facts: int = 4,
    haystack_en: str | None = None,
    haystack_zh: str | None = None,
    where: str | None = None,
    seed: int = 0,
    flags: Flags = FLAGS,
) -> None:
    """Hide facts in long text at every depth, ask for them, and count exact answers.

    The result goes to RUN/eval/needle.json with a heatmap beside it (needle-before.json with --before). Stopped and
    started again with the same settings, it goes on.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        lengths: prompt lengths in tokens, e.g. 8K,32K,128K. Left out: the model's window and four halvings of it.
        depths: where in the text, in percent; for form single.
        trials: questions of a cell.
        languages: en, zh, or en,zh.
        form: single (one fact), multi (several, asked at once), hop (a chain of facts), meaning (several, one of them
            asked for without any of its words).
        facts: how many facts of multi and meaning, or sentences of a hop chain.
        haystack_en: text file, JSONL or folder to hide them in. Left out: the Python documentation of this machine.
        haystack_zh: the same for Chinese. Left out: made-up short sentences.
        where: column=value, rows of the haystack files to take.
        seed: the same seed asks the same questions.
    """
    arguments = dict(locals())
    spoken = _languages(languages)
    fractions: list[float | None] = _depths(depths) if form == "single" else [None]
    if trials < 1:
        raise ConfigError(f"--trials is {trials}: expected 1 or more")
    if not 2 <= facts <= MAX_FACTS:
        raise ConfigError(f"--facts is {facts}: expected 2 to {MAX_FACTS}")
    sizes = None if lengths is None else token_list("--lengths", lengths)

    grid = Grid(form, facts, sizes, fractions, trials, spoken, {"en": haystack_en, "zh": haystack_zh}, where, seed)
    evaluate_on_ranks("eval needle", arguments, lambda answering: _measure(answering, grid), _show)


def _measure(answering: Answering, grid: Grid) -> Result:
    from ds_longft.tools.evaluate.answering import Question
    from ds_longft.tools.evaluate.results import fingerprint

    tokenizer, window = answering.tokenizer, answering.window
    sizes = grid.sizes or default_lengths(window)
    longest = max(sizes)
    stacks = {
        language: Haystack.make(
            tokenizer,
            read_texts(grid.files[language], language, where=grid.where, characters=CHARACTERS_A_TOKEN * longest),
        )
        for language in grid.languages
    }
    if window is not None and longest > window and not answering.flags.json and answering.processes.launch.rank == 0:
        print(f"note: {longest:,} tokens lie beyond the model's window of {window:,}", flush=True)

    def made(ask: Ask) -> tuple[list[int], Callable[[str, float], dict[str, Any]]]:
        prompt, hidden = _hidden(ask, grid, tokenizer, stacks[ask.language])
        return prompt.ids, lambda reply, seconds: judged(ask, prompt.depths, hidden, reply.strip(), seconds)

    def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
        made = summarize(rows, sizes, grid.depths, grid.languages)
        return made | {"form": grid.form, "samples": samples(rows)}

    kind = "needle" if grid.form == "single" else f"needle-{grid.form}"
    tokens = ANSWER_TOKENS * (grid.facts if grid.form == "multi" else 1)
    questions = {ask.key: Question(ask.length_tokens, tokens, partial(made, ask)) for ask in grid.asks(sizes)}
    settings = grid.settings(sizes, fingerprint(s.ids for s in stacks.values()))
    result = answering.ask(kind, settings, questions, summary)
    if result is not None and grid.form == "single":
        from ds_longft.tools.evaluate.heatmap import draw_heatmap

        draw_heatmap(result[0], result[1].with_suffix(".png"))
    return result


def _hidden(ask: Ask, grid: Grid, tokenizer: Any, haystack: Haystack) -> tuple[Prompt, Needle]:
    """A needle in its haystack; the same whenever it is asked for."""
    rng = random.Random(f"{grid.seed} {grid.form} {ask.key}")
    needle = make_needle(grid.form, ask.language, grid.facts, rng)
    places = [ask.depth] if ask.depth is not None else spread(len(needle.sentences), rng)
    prompt = build_prompt(
        tokenizer, haystack, needle, ask.language, tokens=ask.length_tokens, depths=places, rng=rng
    )  # fmt: skip
    return prompt, needle


def _depths(value: str) -> list[float | None]:
    try:
        numbers = [float(part) for part in listed(value)]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= 100 for number in numbers):
        raise ConfigError(f"--depths is {value!r}: expected percents of the text, e.g. 0,50,100")
    return [number / 100 for number in numbers]


def _languages(value: str) -> list[Language]:
    spoken: list[Any] = listed(value)
    if not spoken or not set(spoken) <= set(get_args(Language)):
        raise ConfigError(f"--languages is {value!r}: expected en, zh, or en,zh")
    return spoken


def _show(result: dict[str, Any], path: Path) -> None:
    several, tables = result["form"] != "single", []
    for language, values in result["exact_percent"].items():
        table = Table("exact %", *(f"{int(size):,}" for size in values), title=f"{result['kind']} {language}")
        if not several:
            for depth, line in zip(result["depths"], result["grid"][language], strict=True):
                table.add_row(f"depth {100 * depth:g}%", *(f"{v:.0f}" for v in line))
            table.add_section()
        table.add_row("all", *(f"{v:.1f}" for v in values.values()), style="bold")
        if several:
            table.add_row("share found", *(f"{v:.1f}" for v in result["found_percent"][language].values()))
        tables.append(table)
    heatmap = "" if several else f", {path.with_suffix('.png').name}"
    print_tables(f"{path}{heatmap}", *tables)
