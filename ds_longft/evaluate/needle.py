"""`ds-longft eval needle`: does the model find a fact, wherever in a long text it stands?

A grid of lengths x depths; every cell is asked some times with other names, numbers and text. The model generates its
answer, and only the right number counts.
"""

from __future__ import annotations

import json as json_text
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from ds_longft.config import parse_tokens
from ds_longft.errors import ConfigError
from ds_longft.evaluate.facts import Form, judge, make_needle
from ds_longft.evaluate.haystack import Haystack, build_prompt
from ds_longft.evaluate.texts import Language, read_texts

ANSWER_TOKENS = 40  # of each number asked for: a short sentence around it is no mistake
MAX_FACTS = 16
CHARACTERS_A_TOKEN = 6  # more than any tokenizer takes, for the length of the built-in text


@dataclass(frozen=True)
class Ask:
    """One question of the grid."""

    language: Language
    length_tokens: int
    depth: float | None  # None: the sentences lie all over the text
    trial: int

    @property
    def key(self) -> str:
        """Names its row."""
        place = "-" if self.depth is None else f"{self.depth:g}"
        return f"{self.language}/{self.length_tokens}/{place}/{self.trial}"


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
    before: bool = False,
    base: str | None = None,
    out: str | None = None,
    name: str | None = None,
    json: bool = False,
) -> None:
    """Hide facts in long text at every depth, ask for them, and count exact answers.

    The result goes to RUN/eval/needle.json with a heatmap beside it (needle-before.json with --before). Stopped and
    started again with the same settings, it goes on. One GPU, or the CPU.

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
        before: evaluate the model that the run MODEL started from.
        base: the base model of an adapter, where it has moved.
        out: folder of the results. Left out: RUN/eval, or eval/<model>.
        name: of the result. Left out: needle, needle-multi or needle-hop.
        json: print one JSON object instead of tables.
    """
    from ds_longft.evaluate import results
    from ds_longft.evaluate.cached_attention import CACHED, register
    from ds_longft.evaluate.generate import end_ids, generate
    from ds_longft.evaluate.subject import find_subject, load_subject, one_device, subject_tokenizer

    register()
    spoken = _languages(languages)
    fractions = _depths(depths) if form == "single" else [None]
    if trials < 1:
        raise ConfigError(f"--trials is {trials}: expected 1 or more")
    if not 2 <= facts <= MAX_FACTS:
        raise ConfigError(f"--facts is {facts}: expected 2 to {MAX_FACTS}")
    batch, chunk = tokens_of("--batch_tokens", batch_tokens), tokens_of("--chunk_tokens", chunk_tokens)
    asked_lengths = None if lengths is None else token_list("--lengths", lengths)
    subject = find_subject(model, before=before, base=base)
    tokenizer = subject_tokenizer(subject)
    loaded = load_subject(subject, one_device(), attention=CACHED)
    sizes = asked_lengths or default_lengths(loaded.window)
    files = {"en": haystack_en, "zh": haystack_zh}
    stacks = {
        language: Haystack.make(
            tokenizer, read_texts(files[language], language, where=where, characters=CHARACTERS_A_TOKEN * max(sizes))
        )
        for language in spoken
    }
    asks = [
        Ask(language, size, depth, trial)
        for language in spoken
        for size in sizes
        for depth in fractions
        for trial in range(trials)
    ]
    settings = {
        "weights": results.weights_identity(subject),
        "form": form,
        "facts": 1 if form == "single" else facts,
        "lengths": sizes,
        "depths": fractions,
        "trials": trials,
        "languages": spoken,
        "haystacks": {language: files[language] or "built in" for language in spoken},
        "where": where,
        "seed": seed,
        "answer_tokens": ANSWER_TOKENS,
    }
    kind = "needle" if form == "single" else f"needle-{form}"
    folder, file = results.result_folder(subject, out), results.result_name(name, kind, before)
    rows = results.Rows(folder, file, settings, total=len(asks))
    if loaded.window is not None and max(sizes) > loaded.window and not json:
        print(f"note: {max(sizes):,} tokens lie beyond the model's window of {loaded.window:,}", flush=True)
    stops = end_ids(loaded, tokenizer)
    for group in _batches([ask for ask in asks if not rows.has(ask.key)], batch):
        prompts, needles = [], []
        for ask in group:
            rng = random.Random(f"{seed} {form} {ask.key}")
            hidden = make_needle(form, ask.language, facts, rng)
            places = [ask.depth] if ask.depth is not None else _spread(len(hidden.sentences), rng)
            prompts.append(
                build_prompt(
                    tokenizer,
                    stacks[ask.language],
                    hidden,
                    ask.language,
                    tokens=ask.length_tokens,
                    depths=places,
                    rng=rng,
                )
            )
            needles.append(hidden)
        started = time.monotonic()
        replies = generate(
            loaded,
            [p.ids for p in prompts],
            max_new_tokens=ANSWER_TOKENS * len(needles[0].answers),
            stop_ids=stops,
            chunk_tokens=chunk,
        )
        seconds = (time.monotonic() - started) / len(group)
        for ask, prompt, hidden, reply in zip(group, prompts, needles, replies, strict=True):
            text = tokenizer.decode(reply, skip_special_tokens=True).strip()
            exact, share = judge(hidden.answers, text)
            rows.add(
                {
                    "key": ask.key,
                    "language": ask.language,
                    "length_tokens": ask.length_tokens,
                    "depth": ask.depth,
                    "stands_at": [round(d, 4) for d in prompt.depths],
                    "hidden": list(hidden.sentences),
                    "question": hidden.question.strip(),
                    "answers": list(hidden.answers),
                    "reply": text,
                    "exact": exact,
                    "found_share": round(share, 4),
                    "seconds": round(seconds, 3),
                }
            )
    summary = summarize(rows.rows, sizes, fractions, spoken)
    result = rows.finish(kind, subject.shown, summary | {"form": form, "samples": _samples(rows.rows)})
    heatmap = folder / f"{file}.png"
    if form == "single":
        from ds_longft.evaluate.heatmap import draw_heatmap

        draw_heatmap(result, heatmap)
    if json:
        print(json_text.dumps(result, ensure_ascii=False))
        return
    _show(result, rows.result_path, heatmap if form == "single" else None)


def summarize(
    rows: Sequence[dict[str, Any]], sizes: Sequence[int], depths: Sequence[float | None], languages: Sequence[str]
) -> dict[str, Any]:
    """Exact answers in percent: by language and length, and the grid by depth (rows) and length (columns)."""
    by_length: dict[str, dict[str, float]] = {}
    found: dict[str, dict[str, float]] = {}
    grid: dict[str, list[list[float]]] = {}
    for language in languages:
        mine = [row for row in rows if row["language"] == language]
        of_length = {size: [row for row in mine if row["length_tokens"] == size] for size in sizes}
        by_length[language] = {str(size): _percent([r["exact"] for r in of_length[size]]) for size in sizes}
        found[language] = {str(size): _percent([r["found_share"] for r in of_length[size]]) for size in sizes}
        grid[language] = [
            [_percent([r["exact"] for r in of_length[size] if r["depth"] == depth]) for size in sizes]
            for depth in depths
        ]
    return {"exact_percent": by_length, "found_percent": found, "grid": grid, "lengths": sizes, "depths": depths}


def default_lengths(window: int | None) -> list[int]:
    """The window and four halvings of it, not below 1K."""
    largest = window or 8192
    return sorted({max(1024, largest >> i) for i in range(5)})


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


def _spread(count: int, rng: random.Random) -> list[float]:
    """One place in each of `count` equal parts of the text."""
    return [(i + rng.random()) / count for i in range(count)]


def _batches(asks: list[Ask], batch_tokens: int) -> list[list[Ask]]:
    """Questions of one length together, short ones first."""
    groups: list[list[Ask]] = []
    for size in sorted({ask.length_tokens for ask in asks}):
        same = [ask for ask in asks if ask.length_tokens == size]
        count = max(1, batch_tokens // size)
        groups += [same[i : i + count] for i in range(0, len(same), count)]
    return groups


def _percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 1) if values else 0.0


def _samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some rows to read: the longest prompts, wrong answers first."""
    keys = ("language", "length_tokens", "stands_at", "hidden", "question", "answers", "reply", "exact")
    chosen = sorted(rows, key=lambda row: (row["exact"], -row["length_tokens"]))
    wrong = [row for row in chosen if not row["exact"]][:4]
    right = [row for row in chosen if row["exact"]][:4]
    return [{key: row[key] for key in keys} for row in wrong + right]


def _show(result: dict[str, Any], path: Path, heatmap: Path | None) -> None:
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
    console.print(f"{path}" + (f", {heatmap.name}" if heatmap else ""), soft_wrap=True, highlight=False)
