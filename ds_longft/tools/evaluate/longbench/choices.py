"""`ds-longft eval longbench v2`: LongBench v2, whose questions have four answers, by the likelihood of their letters.

Nothing is generated: the prompt is read once, and the likeliest of A, B, C and D is the answer. Under --sp a prompt of
two million words is a question like any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.readers import read_rows
from ds_longft.data.rows import BadRow
from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.evaluation import Result, Row, evaluate_on_ranks, fingerprint, mean_with_interval
from ds_longft.tools.evaluate.flags import FLAGS, Flags, positive, print_tables, tokens_of
from ds_longft.tools.evaluate.haystack import encode_prompt, without_middle
from ds_longft.tools.evaluate.texts import encode

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

LETTERS = "ABCD"
COLUMNS = ("_id", "difficulty", "length", "question", *(f"choice_{letter}" for letter in LETTERS), "answer", "context")
PROMPT = """Please read the following text and answer the question below.

<text>
{context}
</text>

What is the correct answer to this question: {question}
Choices:
(A) {choice_A}
(B) {choice_B}
(C) {choice_C}
(D) {choice_D}

Format your response as follows: "The correct answer is (insert answer here)"."""  # its prompts/0shot.txt
BEGINS = "The correct answer is ("
RESERVED_TOKENS = 128  # of the window, for the chat template


def v2(
    model: str, data: str, *, max_length: int | str | None = None, limit: int | None = None, flags: Flags = FLAGS
) -> None:
    """Answer LongBench v2 by the likeliest letter, without generating anything.

    Published numbers are of generated answers: compare what was made here with each other.

    Args:
        data: your copy of its rows: data.json, JSONL or parquet.
        max_length: tokens of a text with its question; the middle of longer ones is cut. Left out: the window less 128.
        limit: only this many rows, from the first.
    """
    arguments = dict(locals())
    positive(limit=limit)
    if flags.server is not None:
        raise ConfigError("--server gives answers, not the likelihood of letters: leave it out")
    most = None if max_length is None else tokens_of("--max_length", max_length)

    evaluate_on_ranks("eval longbench v2", arguments, lambda answering: _measure(answering, data, most, limit), _show)


def read_choices(data: str, limit: int | None) -> list[dict[str, Any]]:
    """The rows. Raises DataError: none, or columns missing."""
    rows = []
    for origin, row in read_rows(SourceConfig(path=data)):
        missing = COLUMNS if isinstance(row, BadRow) else [name for name in COLUMNS if name not in row]
        if missing or isinstance(row, BadRow):
            raise DataError(f"{origin} has no {', '.join(missing)}: expected LongBench v2's rows")
        rows.append(row)
    if not rows:
        raise DataError(f"{data} has no rows")
    return rows[:limit]


def lettered(tokenizer: Any, row: dict[str, Any], longest: int) -> tuple[list[int], list[int]]:
    """The prompt up to where the letters differ, and the token of each letter there."""
    text = PROMPT.format(**row)
    text = without_middle(tokenizer, text, encode(tokenizer, text), longest)
    whole = [encode_prompt(tokenizer, text, begins=BEGINS + letter) for letter in LETTERS]
    at = next(i for i, tokens in enumerate(zip(*whole, strict=False)) if len(set(tokens)) > 1)
    letters = [ids[at] for ids in whole]
    assert len(set(letters)) == len(LETTERS), f"letters that begin alike: {letters}"
    return whole[0][:at], letters


def _measure(answering: Answering, data: str, most: int | None, limit: int | None) -> Result:
    rows = {str(row["_id"]): row for row in read_choices(data, limit)}
    longest = most or (answering.window or 8192) - RESERVED_TOKENS
    answering.expect(longest)

    def answer(key: str) -> list[Row]:
        prompt, letters = lettered(answering.tokenizer, rows[key], longest)
        found = answering.reader.read([prompt])[0, letters].log_softmax(-1)
        row, reply = rows[key], LETTERS[int(found.argmax())]
        kept = {name: row[name] for name in ("difficulty", "length", "answer")}
        shares = [round(float(share), 4) for share in found.exp()]
        return [{"key": key, **kept, "reply": reply, "letters": shares, "prompt_tokens": len(prompt)}]

    def summary(found: list[Row]) -> dict[str, Any]:
        groups: dict[str, list[float]] = {"all": []}
        for row in found:
            for name in ("all", row["difficulty"], row["length"]):
                groups.setdefault(name, []).append(100.0 * (row["reply"] == row["answer"]))
        return {"right_percent": {name: [*mean_with_interval([right]), len(right)] for name, right in groups.items()}}

    settings = {"data_fingerprint": fingerprint(rows.values()), "limit": limit, "max_length_tokens": longest}
    answering.add(answering.open_rows("longbench-v2", settings, list(rows)), answer)
    return answering.finish("longbench-v2", summary)


def _show(result: dict[str, Any], path: Path) -> None:
    table = Table("LongBench v2", "right, %", "95 %", "rows")
    for name, (mean, low, high, rows) in result["right_percent"].items():
        table.add_row(name, f"{mean:.1f}", f"{low:.1f} to {high:.1f}", str(rows))
    print_tables(path, table)
