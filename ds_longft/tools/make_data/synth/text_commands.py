"""What `ds-longft data synth stretches|negatives|lists` do: long rows, filled to the token."""

from __future__ import annotations

from functools import partial
from typing import Any

from ds_longft.command_line import tokens_of
from ds_longft.errors import ConfigError
from ds_longft.tools.make_data.synth.commands import write_made, write_of_texts
from ds_longft.tools.make_data.synth.flags_of_synth import Made, MadeOfTexts
from ds_longft.tools.make_data.synth.lists import TASKS, ListTask, list_rows
from ds_longft.tools.make_data.synth.negatives import PART_TOKENS, PARTS, negative_rows
from ds_longft.tools.make_data.synth.refgpt8x import sentence_embedder
from ds_longft.tools.make_data.synth.row_plan import size_parts
from ds_longft.tools.make_data.synth.stretches import stretch_rows

STRETCHES = MadeOfTexts("stretches")
NEGATIVES = MadeOfTexts("negatives")
LISTS = Made("lists")


def stretches(
    source: str,
    out: str,
    *,
    sizes: str | None = None,
    languages: str | None = None,
    separator: str = "\\n\\n",
    flags: MadeOfTexts = STRETCHES,
) -> None:
    """Cut long texts into plain-text rows of many lengths; texts of one language are laid one behind the other.

    Two rows may overlap.

    Args:
        source: set of plain texts, or of references; a file, a folder, or a pattern in quotes.
        out: JSONL file to write.
        sizes: part of the longest row and its share, e.g. 1/4:3,1/2:2,1:2. Left out: halves of halves down to 1/32.
        languages: shares of the rows, e.g. zh:0.15; others as there is text.
        separator: what stands between two documents of a row, which attention reaches over; \\n is a line break. The
            tokenizer's own end of text, e.g. <|endoftext|>, tells the model that another begins.
    """
    made, between = parts_and_shares(sizes, languages), separator.replace("\\n", "\n")
    write_of_texts(source, out, flags, partial(stretch_rows, separator=between, **made))


def negatives(
    source: str,
    out: str,
    *,
    part_tokens: int | str = PART_TOKENS,
    separator: str = "\\n\\n",
    embedding: str | None = None,
    flags: MadeOfTexts = NEGATIVES,
) -> None:
    """Put near neighbours of other documents between a document's parts: what belongs together lies far apart.

    Each row is one document of two parts or more, in its order, up to half of the row; the rest of it are the parts of
    other documents that are most like the part before them. No document is drawn twice.

    Args:
        source: set of plain texts, or of references; a file, a folder, or a pattern in quotes.
        out: JSONL file to write.
        part_tokens: of a part.
        separator: what stands between parts; \\n is a line break.
        embedding: folder or hub id of a sentence-transformers model that finds neighbours. Left out: TF-IDF.
    """
    part = tokens_of("--part_tokens", part_tokens)
    if PARTS * part > flags.longest_tokens:
        seen = f"--context_tokens is {flags.context_tokens}, --part_tokens is {part_tokens}"
        raise ConfigError(f"{seen}: expected room for four parts in one row")
    embed, between = sentence_embedder(embedding) if embedding else None, separator.replace("\\n", "\n")
    write_of_texts(source, out, flags, partial(negative_rows, part_tokens=part, separator=between, embed=embed))


def lists(
    out: str,
    *,
    questions: int = 3,
    tasks: str = ",".join(TASKS),
    sizes: str | None = None,
    flags: Made = LISTS,
) -> None:
    """Lists of made-up names, and questions that one line does not answer: what RULER asks for, in other texts.

    keys: the numbers of several names among like lines. links: all that lies in one place, by lines that point to one
    another. counts: the names that come most often.

    Args:
        out: JSONL file to write, in `messages` form.
        questions: asked of one list, one after the other; of counts one.
        tasks: which of them, comma separated.
        sizes: part of the longest row and its share, e.g. 1/4:3,1/2:2,1:2. Left out: halves of halves down to 1/32.
    """
    asked = tasks.replace(" ", "").split(",")
    if set(asked) - set(TASKS) or questions < 1:
        seen = f"--tasks is {tasks}, --questions is {questions}"
        raise ConfigError(f"{seen}: expected tasks among {', '.join(TASKS)}, and 1 or more questions")
    chosen: list[ListTask] = [task for task in TASKS if task in asked]
    parts, lengths = parts_and_shares(sizes, None)["sizes"], flags.lengths()
    made = list_rows(questions=questions, tasks=chosen, sizes=parts, lengths=lengths, **flags.shared())
    write_made(made, out, lengths, json=flags.json)


def parts_and_shares(sizes: str | None, languages: str | None) -> dict[str, Any]:
    """`--sizes` and `--languages` of rows that are made of running texts. Raises ConfigError."""
    parts = parse_shares("--sizes", sizes, "1/4:3,1:1") if sizes else None
    size_parts(parts or {})
    shares = parse_shares("--languages", languages, "zh:0.15") if languages else {}
    if sum(shares.values()) > 1.000001:
        raise ConfigError(f"--languages is {languages}: the shares add up to more than 1")
    return {"sizes": parts, "languages": shares}


def parse_shares(flag: str, given: str, example: str) -> dict[str, float]:
    """`a:1,b:2` of a command line flag. Raises ConfigError."""
    shares = {}
    for pair in given.replace(" ", "").split(","):
        key, _, share = pair.partition(":")
        try:
            shares[key] = float(share)
        except ValueError:
            raise ConfigError(f"{flag} is {given!r}: expected names and shares, e.g. {example}") from None
    return shares
