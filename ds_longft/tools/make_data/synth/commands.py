"""What `ds-longft data synth` does: samples made of sets and texts, or of nothing, written as rows."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ds_longft.command_line import tokens_of
from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.formats import to_row
from ds_longft.data.ledger import Ledger
from ds_longft.errors import ConfigError
from ds_longft.tools.make_data.commands import reasons
from ds_longft.tools.make_data.convert import written_whole
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.agents import agent_rows
from ds_longft.tools.make_data.synth.code import CHARS_PER_TOKEN, Part, code_rows
from ds_longft.tools.make_data.synth.flags_of_synth import Made, MadeOfTexts, Named
from ds_longft.tools.make_data.synth.lists import TASKS as LIST_TASKS
from ds_longft.tools.make_data.synth.lists import list_rows
from ds_longft.tools.make_data.synth.needle_rows import needle_rows
from ds_longft.tools.make_data.synth.needle_tasks import TASKS as NEEDLE_TASKS
from ds_longft.tools.make_data.synth.negatives import PART_TOKENS, PARTS, negative_rows
from ds_longft.tools.make_data.synth.refgpt8x import MEAN_REFERENCES, hide_references, sentence_embedder
from ds_longft.tools.make_data.synth.row_plan import size_parts
from ds_longft.tools.make_data.synth.sources import read_dialogues, read_documents
from ds_longft.tools.make_data.synth.stretches import stretch_rows

MEASURED_TOGETHER = 16  # rows; the tokenizer works on them in parallel
T = TypeVar("T", bound=str)

REFGPT8X = Named("refgpt8x")
NEEDLE = MadeOfTexts("needle")
STRETCHES = MadeOfTexts("stretches")
NEGATIVES = MadeOfTexts("negatives")
CODE = Made("code", rows=200, context_tokens="4K")
AGENTS = Made("agents", rows=200, context_tokens="128K")
LISTS = Made("lists")


def refgpt8x(
    source: str,
    out: str,
    *,
    rows: int | None = None,
    mean_references: float = MEAN_REFERENCES,
    embedding: str | None = None,
    flags: Named = REFGPT8X,
) -> None:
    """Grow dialogues about a reference: it is hidden among its nearest neighbours, K ~ Poisson(8) texts in all.

    Args:
        source: set with references: RefGPT-Fact, {reference, messages}, {context, qas} or {document, question, answer}.
        rows: how many dialogues to take. Left out: as many as keep the amount of text, dialogues / mean.
        mean_references: mean of the Poisson distribution.
        embedding: sentence-transformers model to find neighbours by. Left out: TF-IDF.
    """
    if mean_references <= 0 or (rows is not None and rows < 1):
        raise ConfigError(f"--rows is {rows}, --mean_references is {mean_references}: expected numbers above 0")
    with Ledger(Path(f"{out}.ledger.jsonl")) as ledger:
        dialogues = read_dialogues(SourceConfig(path=source), ledger)
        made = hide_references(
            dialogues,
            rows=rows or max(1, round(len(dialogues) / mean_references)),
            seed=flags.seed,
            name=flags.name,
            mean_references=mean_references,
            embed=sentence_embedder(embedding) if embedding else None,
        )
        write_made(made, out, Lengths(), ledger, json=flags.json)


def needle(
    source: str, out: str, *, questions: int = 3, tasks: str = ",".join(NEEDLE_TASKS), flags: MadeOfTexts = NEEDLE
) -> None:
    """Ask about real long documents, English or Chinese, what a program can check.

    recall: copy a sentence. location: which paragraph. count: how often. chain: follow 2 to 4 notes hidden in the
    text. absent: not in the text. Each answer is found a second time from the finished text, or the row is not written.
    Lengths are drawn between --context_tokens and a quarter of it.

    Args:
        questions: asked of one context, one after the other.
        tasks: which of them, comma separated.
    """
    chosen = _chosen(tasks, NEEDLE_TASKS, questions)
    write_of_texts(source, out, flags, partial(needle_rows, questions=questions, tasks=chosen))


def code(out: str, *, questions: int = 1, part: Part = "train", flags: Made = CODE) -> None:
    """Write a long-code set made of the Python standard library's source on this machine.

    The same seed gives the same rows on the same Python.

    Args:
        questions: how many are asked of one context, one after the other.
        part: train or eval; the two never share a module.
    """
    if questions < 1:
        raise ConfigError(f"--questions is {questions}: expected 1 or more")
    if part not in ("train", "eval"):
        raise ConfigError(f"--part is {part!r}: expected train or eval")
    wanted = flags.wanted(CHARS_PER_TOKEN)
    write_made(code_rows(wanted, questions=questions, part=part), out, wanted.lengths, json=flags.json)


def agents(out: str, *, shortest_tokens: int | str = "20K", flags: Made = AGENTS) -> None:
    """Trajectories of an agent that finds a number in a small file system: tools, thinking, calls and their results.

    Lengths are met about: the last file that is read may go beyond the longest by a few thousand tokens. A tokenizer
    that counts them needs a chat template that writes tools.

    Args:
        shortest_tokens: of the shortest row, about.
    """
    wanted, shortest = flags.wanted(), tokens_of("--shortest_tokens", shortest_tokens)
    longest = wanted.context_tokens
    if shortest > longest:
        raise ConfigError(
            f"--shortest_tokens is {shortest}, --context_tokens {longest}: expected the first at most the second"
        )
    write_made(agent_rows(wanted, shortest_tokens=shortest), out, wanted.lengths, json=flags.json)


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
    tasks: str = ",".join(LIST_TASKS),
    sizes: str | None = None,
    flags: Made = LISTS,
) -> None:
    """Lists of made-up names, and questions that one line does not answer: what RULER asks for, in other texts.

    keys: the numbers of several names among like lines. links: all that lies in one place, by lines that point to one
    another. counts: the names that come most often.

    Args:
        questions: asked of one list, one after the other; of counts one.
        tasks: which of them, comma separated.
        sizes: part of the longest row and its share, e.g. 1/4:3,1/2:2,1:2. Left out: halves of halves down to 1/32.
    """
    chosen, parts = _chosen(tasks, LIST_TASKS, questions), parts_and_shares(sizes, None)["sizes"]
    wanted = flags.wanted()
    made = list_rows(wanted, questions=questions, tasks=chosen, sizes=parts)
    write_made(made, out, wanted.lengths, json=flags.json)


def write_of_texts(source: str, out: str, flags: MadeOfTexts, make: Callable[..., Iterator[dict[str, Any]]]) -> None:
    """Write the rows that `make` makes of the documents of a source and of what is wanted."""
    wanted, taken = flags.wanted(), flags.taken
    with Ledger(Path(f"{out}.ledger.jsonl")) as ledger:
        documents = read_documents(SourceConfig(path=source), ledger, taken)
        write_made(make(documents, wanted), out, wanted.lengths, ledger, json=flags.json)


def write_made(
    made: Iterator[dict[str, Any]], out: str, lengths: Lengths, ledger: Ledger | None = None, *, json: bool
) -> None:
    """Write made rows, chats or plain texts, and say how long they are. `ledger`: of what they are made of."""
    tokens: list[int] = []
    with written_whole(Path(out)) as file:
        while records := list(islice(made, MEASURED_TOGETHER)):
            rows = [to_row(record, "messages", source="", origin="") for record in records]
            tokens += lengths.rows([row.turns for row in rows], [row.tools for row in rows])
            file.writelines(json_text.dumps(record, ensure_ascii=False) + "\n" for record in records)
    facts = {
        "path": out,
        "rows": len(tokens),
        "shortest_tokens": min(tokens),
        "median_tokens": int(np.median(tokens)),
        "longest_tokens": max(tokens),
        "exact_lengths": lengths.exact,
        "unusable_source_rows": ledger.tally.bad_rows if ledger else 0,
    }
    if json:
        print(json_text.dumps(facts))
        return
    about = "" if lengths.exact else " (estimated)"
    print(f"{out}: {len(tokens):,} rows of {min(tokens):,} to {max(tokens):,} tokens{about}")
    if ledger and ledger.tally.unusable_rows:
        print(f"{ledger.path}: {reasons(ledger.tally)}")


def _chosen(tasks: str, known: Sequence[T], questions: int) -> list[T]:
    asked = tasks.replace(" ", "").split(",")
    if set(asked) - set(known) or questions < 1:
        seen = f"--tasks is {tasks}, --questions is {questions}"
        raise ConfigError(f"{seen}: expected tasks among {', '.join(known)}, and 1 or more questions")
    return [task for task in known if task in asked]


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
