"""What the demonstration in extend_smollm2.sh needs beside the program itself: a rehearsal's texts, result lines.

`texts` writes the built-in texts of `ds-longft eval` as the folder of long documents that a user would bring.
`results` reads the evaluations of a run, before and after, and prints one JSON object a line for results.jsonl.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import fire

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.work import commit
from ds_longft.evaluate.texts import chinese, english

CHARACTERS_A_TOKEN = {"en": 6, "zh": 2}  # more than SmolLM2's tokenizer takes
DOCUMENT_CHARS = 20_000


def texts(out: str, length: int) -> None:
    """Write built-in text in two languages, enough for stretches of `length` tokens, as longdocs_built_in.jsonl.

    And a few short chats as instruct_built_in.jsonl.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "longdocs_built_in.jsonl").open("w", encoding="utf-8") as file:
        for language, make in (("en", english), ("zh", chinese)):
            text = make(2 * CHARACTERS_A_TOKEN[language] * length)
            for start in range(0, len(text), DOCUMENT_CHARS):
                row = {"text": text[start : start + DOCUMENT_CHARS], "lang": language, "collection": "built in"}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with (folder / "instruct_built_in.jsonl").open("w", encoding="utf-8") as file:
        for a in range(100):
            turns = [("user", f"What is {a} + {a + 7}?"), ("assistant", f"{a} + {a + 7} is {2 * a + 7}.")]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns], "lang": "en"}) + "\n")


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
        return json.loads((folder / "eval" / f"{name}.json").read_text())

    def line(what: str, value: float, unit: str) -> None:
        print(
            json.dumps(
                {**head, "what": what, "value": round(value, 4), "unit": unit, "peer_value": None, "ratio": None}
            )
        )

    before, after = result("perplexity-before"), result("perplexity")
    tokens, edges = after["length_tokens"], after["edges_tokens"]
    low, high = tokens // 64, tokens // 16  # 2K and 8K of 128K
    inside = [i for i, (a, b) in enumerate(pairwise(edges)) if a >= low and b <= high]
    base = sum(before["loss_by_bucket"][i] for i in inside) / len(inside)
    shown = f"base {low // 1024}k-{high // 1024}k" if low >= 1024 else f"base {low}-{high}"
    for number, value in enumerate(after["loss_by_eighth"], start=1):
        name = "last eighth" if number == 8 else f"eighth {number}"
        line(f"loss {tokens} {name} minus {shown}", value - base, "nats/token")
    line(f"loss {shown}", base, "nats/token")
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


if __name__ == "__main__":
    fire.Fire({"texts": texts, "results": results})
