"""`ds-longft eval needle`: does the model find a fact, wherever in a long text it stands?

A grid of lengths x depths; every cell is asked some times with other names, numbers and text. The model generates its
answer, and only the right number counts.
"""

from __future__ import annotations

import random
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.table import Table

from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.evaluation import Made, Question, Result, Row, evaluate_on_ranks, fingerprint
from ds_longft.tools.evaluate.flags import (
    FLAGS,
    Flags,
    default_lengths,
    listed,
    positive,
    print_tables,
    token_list,
)  # fmt: skip
from ds_longft.tools.evaluate.haystack import Haystack, build_prompt
from ds_longft.tools.evaluate.needle_facts import Form, judge, make_needle
from ds_longft.tools.evaluate.texts import CHARACTERS_A_TOKEN, Language, read_texts

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

MAX_FACTS = 16
COLOURS = ("#f9dcb8", "#9ecae8")  # of the pages: none and all; black on them has a contrast of 10 to 1 and more
ANSWER_TOKENS = 40  # of each number asked for: a short sentence around it is no mistake


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

    A heatmap lies beside the result.

    Args:
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
    positive(trials=trials)
    spoken: list[Any] = listed(languages)
    if not spoken or not set(spoken) <= set(get_args(Language)):
        raise ConfigError(f"--languages is {languages!r}: expected en, zh, or en,zh")
    try:
        percents = [float(part) for part in listed(depths)]
    except ValueError:
        percents = [-1.0]
    if not all(0 <= percent <= 100 for percent in percents):
        raise ConfigError(f"--depths is {depths!r}: expected percents of the text, e.g. 0,50,100")
    if not 2 <= facts <= MAX_FACTS:
        raise ConfigError(f"--facts is {facts}: expected 2 to {MAX_FACTS}")
    given = {"en": haystack_en, "zh": haystack_zh}
    files = {language: given[language] for language in spoken}
    told = {
        "form": form,
        "facts": 1 if form == "single" else facts,
        "lengths": None if lengths is None else token_list("--lengths", lengths),
        "depths": [percent / 100 for percent in percents] if form == "single" else [None],
        "trials": trials,
        "languages": spoken,
        "haystacks": {language: file or "built in" for language, file in files.items()},
        "where": where,
        "seed": seed,
        "answer_tokens": ANSWER_TOKENS,
    }
    evaluate_on_ranks("eval needle", arguments, lambda answering: _measure(answering, told, files), _show)


def _measure(answering: Answering, told: dict[str, Any], files: dict[Language, str | None]) -> Result:
    tokenizer, window, form = answering.tokenizer, answering.window, told["form"]
    sizes, depths = told["lengths"] or default_lengths(window), told["depths"]
    longest = max(sizes)
    stacks = {}
    for language, file in files.items():
        texts = read_texts(file, language, where=told["where"], characters=CHARACTERS_A_TOKEN * longest)
        stacks[language] = Haystack.make(tokenizer, texts)
    if window is not None and longest > window and not answering.flags.json and answering.processes.launch.rank == 0:
        print(f"note: {longest:,} tokens lie beyond the model's window of {window:,}", flush=True)

    def made(key: str, language: Language, size: int, depth: float | None) -> Made:
        """A needle in its haystack, the same whenever it is asked for. `depth`: None for several, all over the text."""
        rng = random.Random(f"{told['seed']} {form} {key}")
        hidden = make_needle(form, language, told["facts"], rng)
        count = len(hidden.sentences)
        places = [(i + rng.random()) / count for i in range(count)] if depth is None else [depth]
        prompt = build_prompt(tokenizer, stacks[language], hidden, language, tokens=size, depths=places, rng=rng)

        def judged(reply: str, seconds: float) -> Row:
            exact, share = judge(hidden.answers, reply.strip())
            return {
                "language": language,
                "length_tokens": size,
                "depth": depth,
                "stands_at": [round(d, 4) for d in prompt.depths],
                "hidden": list(hidden.sentences),
                "question": hidden.question.strip(),
                "answers": list(hidden.answers),
                "reply": reply.strip(),
                "exact": exact,
                "found_share": round(share, 4),
                "seconds": seconds,
            }

        return prompt.ids, judged

    tokens = ANSWER_TOKENS * (told["facts"] if form == "multi" else 1)
    questions = {}
    for language, size, depth, trial in product(files, sizes, depths, range(told["trials"])):
        key = f"{language}/{size}/{'-' if depth is None else f'{depth:g}'}/{trial}"
        questions[key] = Question(size, tokens, partial(made, key, language, size, depth))
    settings = {**told, "lengths": sizes, "texts_fingerprint": fingerprint(s.ids for s in stacks.values())}
    kind = "needle" if form == "single" else f"needle-{form}"
    result = answering.ask(kind, settings, questions, lambda rows: {**_summary(rows, settings), "form": form})
    if result is not None and form == "single":
        _draw_heatmap(result[0], result[1].with_suffix(".png"))
    return result


def _summary(rows: list[Row], settings: dict[str, Any]) -> dict[str, Any]:
    """Exact answers in percent: by language and length, and the grid by depth (rows) and length (columns). Some rows to
    read: the longest prompts, wrong answers first.
    """
    sizes, depths = settings["lengths"], settings["depths"]

    def percent(what: str, **of: Any) -> float:
        values = [row[what] for row in rows if all(row[key] == value for key, value in of.items())]
        return round(100 * sum(values) / len(values), 1) if values else 0.0

    exact: dict[str, dict[str, float]] = {}
    found: dict[str, dict[str, float]] = {}
    grid: dict[str, list[list[float]]] = {}
    for language in settings["languages"]:
        of = partial(percent, language=language)
        exact[language] = {str(size): of("exact", length_tokens=size) for size in sizes}
        found[language] = {str(size): of("found_share", length_tokens=size) for size in sizes}
        grid[language] = [[of("exact", length_tokens=size, depth=depth) for size in sizes] for depth in depths]
    shown = ("language", "length_tokens", "stands_at", "hidden", "question", "answers", "reply", "exact")
    ordered = sorted(rows, key=lambda row: -row["length_tokens"])
    chosen = [row for verdict in (False, True) for row in [row for row in ordered if row["exact"] == verdict][:4]]
    samples = [{key: row[key] for key in shown} for row in chosen]
    return {
        "exact_percent": exact, "found_percent": found, "grid": grid, "lengths": sizes, "depths": depths,
        "samples": samples,
    }  # fmt: skip


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


def _draw_heatmap(result: dict[str, Any], path: Path) -> None:
    """A PNG of the grid, one panel per language: lengths across, depths down, exact answers as colour and number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("found", COLOURS)
    grids = result["grid"]
    lengths, depths = result["lengths"], result["depths"]
    width = max(4.0, 1.1 * len(lengths) + 2)
    size = (width * len(grids), max(2.6, 0.5 * len(depths) + 1.6))
    fig, axes = plt.subplots(1, len(grids), figsize=size, layout="constrained", squeeze=False)
    for ax, (language, grid) in zip(axes[0], grids.items(), strict=True):
        image = ax.imshow(grid, cmap=shades, vmin=0, vmax=100, aspect="auto")
        ax.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
        ax.set_yticks(range(len(depths)), [f"{100 * d:g}%" for d in depths])
        ax.set(xlabel="prompt, tokens", ylabel="depth", title=f"needle, {language}: exact answers, %")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                ax.text(x, y, f"{value:.0f}", ha="center", va="center", color="black", fontsize=9)
    fig.colorbar(image, ax=axes[0], shrink=0.9)
    model, trials = Path(result["model"].rpartition(" + ")[2]).name, result["settings"]["trials"]
    told = f"{model}, {trials} questions per cell, {result['date']}"
    fig.suptitle(told, fontsize=9, parse_math=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"
