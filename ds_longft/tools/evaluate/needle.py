"""`ds-longft eval needle`: does the model find a fact, wherever in a long text it stands?

A grid of lengths x depths; every cell is asked some times with other names, numbers and text. The model generates its
answer, and only the right number counts.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.table import Table

from ds_longft.config.run_config import parse_tokens
from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.grid import (
    ANSWER_TOKENS,
    Ask,
    Grid,
    batches,
    default_lengths,
    judged,
    samples,
    spread,
    summarize,
)
from ds_longft.tools.evaluate.haystack import Haystack, Prompt, build_prompt
from ds_longft.tools.evaluate.needle_facts import Form, Needle, make_needle
from ds_longft.tools.evaluate.texts import Language, read_texts

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

MAX_FACTS = 16
CHARACTERS_A_TOKEN = 6  # more than any tokenizer takes, for the length of the built-in text


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
    batch_tokens: int | str = "128K",
    chunk_tokens: int | str = "8K",
    seed: int = 0,
    gpus: int = 1,
    before: bool = False,
    base: str | None = None,
    out: str | None = None,
    name: str | None = None,
    json: bool = False,
) -> None:
    """Hide facts in long text at every depth, ask for them, and count exact answers.

    The result goes to RUN/eval/needle.json with a heatmap beside it (needle-before.json with --before). Stopped and
    started again with the same settings, it goes on. With --gpus N every GPU answers its share; each holds the model.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        lengths: prompt lengths in tokens, e.g. 8K,32K,128K. Left out: the model's window and four halvings of it.
        depths: where in the text, in percent; for form single.
        trials: questions of a cell.
        languages: en, zh, or en,zh.
        form: single (one fact), multi (several, asked at once), hop (a chain of facts).
        facts: how many facts of multi, or sentences of a hop chain.
        haystack_en: text file, JSONL or folder to hide them in. Left out: the Python documentation of this machine.
        haystack_zh: the same for Chinese. Left out: made-up short sentences.
        where: column=value, rows of the haystack files to take.
        batch_tokens: prompts of one length are read together up to so many tokens.
        chunk_tokens: tokens of a prompt that are read at a time.
        seed: the same seed asks the same questions.
        gpus: how many GPUs of this machine to use; on a CPU, processes.
        before: evaluate the model that the run MODEL started from.
        base: the base model of an adapter, where it has moved.
        out: folder of the results. Left out: RUN/eval, or eval/<model>.
        name: of the result. Left out: needle, needle-multi or needle-hop.
        json: print one JSON object instead of tables.
    """
    arguments = dict(locals())
    from ds_longft.tools.evaluate.processes import Processes, start_ranks

    spoken = _languages(languages)
    fractions: list[float | None] = _depths(depths) if form == "single" else [None]
    if trials < 1:
        raise ConfigError(f"--trials is {trials}: expected 1 or more")
    if not 2 <= facts <= MAX_FACTS:
        raise ConfigError(f"--facts is {facts}: expected 2 to {MAX_FACTS}")
    batch, chunk = tokens_of("--batch_tokens", batch_tokens), tokens_of("--chunk_tokens", chunk_tokens)
    sizes = None if lengths is None else token_list("--lengths", lengths)
    if start_ranks("needle", "--gpus", gpus, arguments):
        return
    from ds_longft.tools.evaluate import results  # brings torch: not in a process that only starts others
    from ds_longft.tools.evaluate.answering import Answering, Target

    grid = Grid(form, facts, sizes, fractions, trials, spoken, {"en": haystack_en, "zh": haystack_zh}, where, seed)
    with Processes.of_launch() as processes:
        answering = Answering(processes, Target(model, before, base, out, name), chunk)
        made = _measure(answering, grid, batch, quiet=json)
    results.show(made, json, _show)


def _measure(answering: Answering, grid: Grid, batch_tokens: int, *, quiet: bool) -> tuple[dict[str, Any], Path] | None:
    """The result and its file on the process that writes, None on the others."""
    from ds_longft.tools.evaluate.results import fingerprint

    tokenizer, window = answering.tokenizer, answering.loaded.window
    sizes = grid.sizes or default_lengths(window)
    longest = max(sizes)
    stacks = {
        language: Haystack.make(
            tokenizer,
            read_texts(grid.files[language], language, where=grid.where, characters=CHARACTERS_A_TOKEN * longest),
        )
        for language in grid.languages
    }
    asks = grid.asks(sizes)
    kind = "needle" if grid.form == "single" else f"needle-{grid.form}"
    done = answering.open_rows(kind, grid.settings(sizes, fingerprint(s.ids for s in stacks.values())), len(asks))
    if window is not None and longest > window and not quiet and answering.processes.launch.rank == 0:
        print(f"note: {longest:,} tokens lie beyond the model's window of {window:,}", flush=True)

    def answer(group: list[Ask]) -> list[dict[str, Any]]:
        prompts, needles = zip(*(_hidden(ask, grid, tokenizer, stacks[ask.language]) for ask in group), strict=True)
        started = time.monotonic()
        texts = answering.replies([p.ids for p in prompts], ANSWER_TOKENS * len(needles[0].answers))
        seconds = (time.monotonic() - started) / len(group)
        return [
            judged(ask, prompt.depths, needle, text.strip(), seconds)
            for ask, prompt, needle, text in zip(group, prompts, needles, texts, strict=True)
        ]

    def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
        made = summarize(rows, sizes, grid.depths, grid.languages)
        return made | {"form": grid.form, "samples": samples(rows)}

    groups = batches([ask for ask in asks if ask.key not in done], batch_tokens, answering.processes.launch.world)
    made = answering.fill(kind, groups, answer, summary)
    if made is not None and grid.form == "single":
        from ds_longft.tools.evaluate.heatmap import draw_heatmap

        draw_heatmap(made[0], made[1].with_suffix(".png"))
    return made


def _hidden(ask: Ask, grid: Grid, tokenizer: Any, haystack: Haystack) -> tuple[Prompt, Needle]:
    """A needle in its haystack; the same whenever it is asked for."""
    rng = random.Random(f"{grid.seed} {grid.form} {ask.key}")
    needle = make_needle(grid.form, ask.language, grid.facts, rng)
    places = [ask.depth] if ask.depth is not None else spread(len(needle.sentences), rng)
    prompt = build_prompt(
        tokenizer, haystack, needle, ask.language, tokens=ask.length_tokens, depths=places, rng=rng
    )  # fmt: skip
    return prompt, needle


def tokens_of(flag: str, value: int | str) -> int:
    """`128K` -> 131072. Raises ConfigError for what is no positive count."""
    tokens = parse_tokens(value)
    if isinstance(tokens, str) and tokens.strip().isdigit():
        tokens = int(tokens)
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"{flag} is {value!r}: expected a number of tokens, e.g. 4096 or 128K")
    return tokens


def token_list(flag: str, value: str) -> list[int]:
    """`8K,32K` -> [8192, 32768], in ascending order."""
    return sorted({tokens_of(flag, part) for part in value.strip("()[]").split(",") if part.strip()})


def _depths(value: str) -> list[float | None]:
    try:
        numbers = [float(part) for part in value.strip("()[]").split(",")]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= 100 for number in numbers):
        raise ConfigError(f"--depths is {value!r}: expected percents of the text, e.g. 0,50,100")
    return [number / 100 for number in numbers]


def _languages(value: str) -> list[Language]:
    spoken: list[Any] = [part.strip() for part in value.strip("()[]").split(",")]
    if not spoken or not set(spoken) <= set(get_args(Language)):
        raise ConfigError(f"--languages is {value!r}: expected en, zh, or en,zh")
    return spoken


def _show(result: dict[str, Any], path: Path) -> None:
    console = Console()
    several = result["form"] != "single"
    for language, values in result["exact_percent"].items():
        table = Table("exact %", *(f"{int(size):,}" for size in values), title=f"{result['kind']} {language}")
        if not several:
            for depth, line in zip(result["depths"], result["grid"][language], strict=True):
                table.add_row(f"depth {100 * depth:g}%", *(f"{v:.0f}" for v in line))
            table.add_section()
        table.add_row("all", *(f"{v:.1f}" for v in values.values()), style="bold")
        if several:
            table.add_row("share found", *(f"{v:.1f}" for v in result["found_percent"][language].values()))
        console.print(table)
    heatmap = "" if several else f", {path.with_suffix('.png').name}"
    console.print(f"{path}{heatmap}", soft_wrap=True, highlight=False)
