"""What run.sh needs beside the program itself: a rehearsal's texts, numbers hidden in long texts, result lines.

`texts` writes the built-in texts of `ds-longft eval` as the folder of long documents that a user would bring.
`numbers` makes rows of them: numbers hidden in running text, and asked for.
`results` reads the evaluations of a run, before and after, and prints one JSON object a line for results.jsonl.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import fire

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.work import commit
from ds_longft.errors import ConfigError, LongftError
from ds_longft.tools.evaluate.texts import chinese, english
from ds_longft.tools.make_data.synth.commands import parts_and_shares, write_of_texts
from ds_longft.tools.make_data.synth.flags_of_synth import MadeOfTexts
from examples.extend_smollm2 import hidden_numbers as hidden

CHARACTERS_A_TOKEN = {"en": 6, "zh": 2}  # more than SmolLM2's tokenizer takes
DOCUMENT_CHARS = 20_000


def texts(out: str, length: int) -> None:
    """Write built-in text in two languages, enough for stretches of `length` tokens: longdocs_, longqa_built_in.jsonl.

    And a few short chats as instruct_built_in.jsonl.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    def documents(language: str, make: Callable[[int], str]) -> list[str]:
        text = make(2 * CHARACTERS_A_TOKEN[language] * length)
        return [text[start : start + DOCUMENT_CHARS] for start in range(0, len(text), DOCUMENT_CHARS)]

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}_built_in.jsonl").write_text("".join(lines), encoding="utf-8")

    english_documents = documents("en", english)
    both = {"en": english_documents, "zh": documents("zh", chinese)}
    write("longdocs", [{"text": t, "lang": lang, "collection": "built in"} for lang in both for t in both[lang]])
    asked = {"qas": [{"question": "What is this?", "answer": "A manual."}], "lang": "en", "eval_kind": "f1"}
    write("longqa", [{"context": t, **asked} for t in english_documents])
    turns = [[("user", f"What is {a} + {a + 7}?"), ("assistant", f"{a} + {a + 7} is {2 * a + 7}.")] for a in range(100)]
    write("instruct", [{"messages": [{"role": r, "content": c} for r, c in pair], "lang": "en"} for pair in turns])


def numbers(
    source: str,
    out: str,
    *,
    rows: int = 1000,
    context_tokens: int | str = "32K",
    questions: int = hidden.QUESTIONS,
    at_once: int | None = None,
    sizes: str | None = None,
    languages: str | None = None,
    where: str | None = None,
    exclude: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    name: str = "numbers",
    json: bool = False,
) -> None:
    """Hide numbers in long texts, English or Chinese, and ask for each of them, one or several in a turn.

    The wordings and names are others than those that `ds-longft eval needle` asks with.

    Args:
        source: set of plain texts, or of references; a file, a folder, or a pattern in quotes.
        out: JSONL file to write.
        rows: how many.
        context_tokens: longest row, e.g. 128K.
        questions: at most so many numbers are hidden in a row, and --at_once at least; fewer in rows of which they
            would be more than half.
        at_once: up to so many are asked for in one turn; half of the turns ask for so many. Left out: 4, or all.
        sizes: part of the longest row and its share, e.g. 1/4:3,1/2:2,1:2. Left out: halves of halves down to 1/32.
        languages: shares of the rows, e.g. zh:0.15; others as there is text.
        where: column=value, rows of the source to take.
        exclude: column=value, rows of the source to leave out.
        tokenizer: folder or hub id of a model, to fill lengths exactly. Left out: lengths are estimated.
        seed: the same seed gives the same rows.
        name: written to each row as its source.
        json: print one JSON object instead of a line.
    """
    at_once = min(hidden.AT_ONCE, questions) if at_once is None else at_once
    if not 1 <= at_once <= questions <= hidden.MAX_QUESTIONS:
        seen = f"--questions is {questions}, --at_once is {at_once}"
        raise ConfigError(f"{seen}: expected 1 to {hidden.MAX_QUESTIONS}, and no more at once than there are")
    flags = MadeOfTexts(name, seed, json, rows, context_tokens, tokenizer, where, exclude)
    shared = {"questions": questions, "at_once": at_once, **parts_and_shares(sizes, languages)}
    write_of_texts(source, out, flags, lambda texts, wanted: hidden.number_rows(texts, **vars(wanted), **shared))


def results(run: str, command: str) -> None:
    """One line for each number of the demonstration, out of RUN/eval."""
    folder = Path(run)
    machine = json.loads((folder / "versions.json").read_text())
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": f"{machine['machine']['world']} x {machine['machine']['device']}",
        "versions": machine["versions"],
        "command": command,
    }

    def result(name: str) -> dict[str, Any]:
        path = folder / "eval" / f"{name}.json"
        if not path.is_file():
            sys.exit(f"{path} is missing: run run.sh with ONLY=before and ONLY=after first")
        return json.loads(path.read_text())

    def line(what: str, value: float, unit: str, **more: float) -> None:
        rounded = {"what": what, "value": round(value, 4), "unit": unit, **more, "peer_value": None, "ratio": None}
        print(json.dumps({**head, **rounded}))

    before, after = result("perplexity-before"), result("perplexity")
    tokens, high = after["length_tokens"], before["settings"]["window_tokens"]  # in windows: 2K to 8K before each token
    shown = f"base {high // 4096}k-{high // 1024}k" if high >= 4096 else f"base {high // 4}-{high}"
    pairs = zip(before["loss_by_eighth"], after["loss_by_eighth"], strict=True)
    for number, (same_text, value) in enumerate(pairs, start=1):
        name = "last eighth" if number == 8 else f"eighth {number}"
        what = f"loss {tokens} {name} minus {shown}"
        line(what, value - before["loss"], "nats/token", same_text=round(value - same_text, 4))
    line(f"loss {shown}", before["loss"], "nats/token")
    for language, name in (("en", "needle"), ("zh", "needle-zh")):
        for size, value in result(name)["exact_percent"][language].items():
            line(f"needle {size} exact match" + ("" if language == "en" else f" {language}"), value, "%")
    for size, value in result("needle-multi")["exact_percent"]["en"].items():
        line(f"needle {size} four at once exact match", value, "%")
    for size, value in result("needle-multi")["found_percent"]["en"].items():
        line(f"needle {size} four at once found", value, "%")
    line("short-text loss after minus before", result("short")["loss"] - result("short-before")["loss"], "nats/token")
    line(
        "short questions after minus before",
        result("short")["right_percent"] - result("short-before")["right_percent"],
        "points",
    )
    records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = list(accumulate(r["step_s"] for r in records if "step_s" in r))
    line("training time", seconds[-1] if seconds else 0.0, "s")


def main(argv: list[str]) -> int:
    """Run one of the commands; returns the exit code."""
    try:
        fire.Fire({"texts": texts, "numbers": numbers, "results": results}, command=argv)
    except LongftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
