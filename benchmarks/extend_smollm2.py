"""Data and result lines of the demonstration in extend_smollm2.sh.

`data` writes texts.jsonl (plain text, every token trained) and needles.jsonl (numbers hidden in such text, asked for in
several turns). Wordings, names and texts differ from those that `ds-longft eval needle` and the held-out texts use.
`results` reads the evaluations of a run, before and after, and prints one JSON object a line for results.jsonl.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import time
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import fire
from transformers import AutoTokenizer

from ds_longft.evaluate.texts import chinese, encode, english

HELD_OUT = "Shakespeare plays (sample)"
CITIES = [
    "Paris", "Oslo", "Cairo", "Lima", "Quito", "Seoul", "Delhi", "Rome", "Bern", "Kyiv", "Riga",
    "Doha", "Hanoi", "Dakar", "Accra", "Tunis", "Sofia", "Minsk", "Havana", "Lisbon", "Madrid",
    "Dublin", "Vienna", "Prague", "Warsaw", "Athens", "Ankara", "Baku", "Tehran", "Kabul",
]  # fmt: skip
CITIES_ZH = [
    "北京", "上海", "广州", "成都", "西安", "南京", "武汉", "杭州", "昆明", "青岛", "长沙", "福州", "沈阳", "兰州",
    "桂林", "拉萨",
]  # fmt: skip
# statement, question. None of them is asked in the evaluation.
WORDINGS = (
    ("The secret number of {n} is {v}.", "What is the secret number of {n}?"),
    ("Remember this: the magic number for {n} is {v}.", "Which magic number belongs to {n}?"),
    ("{n} has the registration {v}.", "What is the registration of {n}?"),
    ("The parcel for {n} carries the label {v}.", "Which label does the parcel for {n} carry?"),
    ("Train {v} leaves for {n} in the evening.", "What is the number of the train that leaves for {n}?"),
    ("For calls to {n}, dial {v}.", "Which number has to be dialled for {n}?"),
    ("The pass phrase of the {n} office is {v}.", "What is the pass phrase of the {n} office?"),
    ("Account {v} is held by the branch in {n}.", "Which account is held by the branch in {n}?"),
)
WORDINGS_ZH = (
    ("{n}的秘密数字是{v}。", "{n}的秘密数字是多少？"),
    ("开往{n}的列车车次为{v}。", "开往{n}的列车车次是多少？"),
    ("寄往{n}的包裹贴着{v}号标签。", "寄往{n}的包裹贴着几号标签？"),
)
SINGLE = {
    "en": ("{q}", "{q} Reply with the number only.", "{q} Give just the number."),
    "zh": ("{q}", "{q}请只写数字。"),
}
SEVERAL = {
    "en": "{q} Reply with the numbers only, in this order, separated by commas.",
    "zh": "{q}请按顺序只写数字，用逗号分隔。",
}
HEAD = {"en": ("Read this text.\n\n", "Here is a document.\n\n", ""), "zh": ("请阅读这段文字。\n\n", "")}
LENGTHS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the longest
SHARES = (3, 3, 3, 3, 2, 2)


def data(out: str, model: str, length: int, texts: str | None = None, rows: int = 300, seed: int = 0) -> None:
    """Write texts.jsonl and needles.jsonl, `rows` rows each, of up to `length` tokens.

    texts: folder with longdocs_*.jsonl.gz; without it the built-in text of `ds-longft eval` is used (a rehearsal).
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(Path(model).expanduser())
    streams = {language: read(tokenizer, texts, language, length) for language in ("en", "zh")}
    rng = random.Random(seed)
    for name, make in (("texts", text_row), ("needles", needle_row)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(rows):
                language = "zh" if rng.random() < 0.15 else "en"
                size = round(rng.choices(LENGTHS, SHARES)[0] * length)
                row = make(tokenizer, rng, language, streams[language], size)
                file.write(json.dumps({**row, "language": language}, ensure_ascii=False) + "\n")
    print(f"{folder}: {rows} texts and {rows} rows of needles of {round(LENGTHS[0] * length):,} to {length:,} tokens")


def read(tokenizer: Any, texts: str | None, language: str, length: int) -> list[int]:
    """All training text of a language as tokens; the held-out collection is left out."""
    if texts is None:
        return encode(tokenizer, english(6 * length) if language == "en" else chinese(4 * length))
    found = []
    for file in sorted(Path(texts).glob("longdocs_*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        found += [row["text"] for row in rows if row["lang"] == language and row["collection"] != HELD_OUT]
    return encode(tokenizer, "\n\n".join(found))


def piece(stream: list[int], rng: random.Random, tokens: int) -> list[int]:
    """A stretch from anywhere."""
    start = rng.randrange(max(1, len(stream) - tokens))
    return stream[start : start + tokens]


def text_row(tokenizer: Any, rng: random.Random, language: str, stream: list[int], tokens: int) -> dict[str, Any]:
    """Plain text; a few tokens less, since other borders may make other tokens."""
    return {"text": tokenizer.decode(piece(stream, rng, tokens - tokens // 64))}


def needle_row(tokenizer: Any, rng: random.Random, language: str, stream: list[int], tokens: int) -> dict[str, Any]:
    """Facts in a text and four to eight questions about them: one number at a time, sometimes several."""
    wordings, names = (WORDINGS, CITIES) if language == "en" else (WORDINGS_ZH, CITIES_ZH)
    facts = []
    for name in rng.sample(names, 8):
        statement, question = rng.choice(wordings)
        value = str(rng.randrange(10**5, 10**7))
        facts.append((statement.format(n=name, v=value), question.format(n=name), value))
    room = tokens - tokens // 64 - 700
    text = tokenizer.decode(piece(stream, rng, max(64, room)))
    blank = " " if language == "en" else ""
    ends = [i + 1 for i, c in enumerate(text) if c in ".!?。！？\n"] or [len(text)]
    for place, (statement, _, _) in zip(sorted(rng.choices(ends, k=len(facts)), reverse=True), facts, strict=True):
        text = text[:place] + blank + statement + blank + text[place:]
    turns: list[dict[str, str]] = []
    left = rng.sample(facts, len(facts))
    while left:
        count = rng.choice((1, 1, 1, 2, 3, 4))
        asked, left = left[:count], left[count:]
        question = blank.join(fact[1] for fact in asked)
        template = rng.choice(SINGLE[language]) if len(asked) == 1 else SEVERAL[language]
        content = template.format(q=question)
        if not turns:
            content = rng.choice(HEAD[language]) + text + "\n\n" + content
        turns += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": ", ".join(f[2] for f in asked)},
        ]
    return {"messages": turns}


def results(run: str, command: str) -> None:
    """One line for each number of the demonstration, out of RUN/eval."""
    folder = Path(run)
    machine = json.loads((folder / "versions.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    head = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.strip(),
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
    for language, sizes in result("needle")["exact_percent"].items():
        for size, value in sizes.items():
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
    fire.Fire({"data": data, "results": results})
