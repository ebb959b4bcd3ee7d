"""What `ds-longft data synth refgpt8x|needle|code|agents` do: samples made of sets and texts, written as rows."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ds_longft.config.run_config import SourceConfig, parse_tokens
from ds_longft.data.formats import to_row
from ds_longft.data.ledger import Ledger
from ds_longft.errors import ConfigError
from ds_longft.tools.look.commands import load_tokenizer
from ds_longft.tools.make_data.commands import reasons
from ds_longft.tools.make_data.convert import written_whole
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.agents import agent_rows
from ds_longft.tools.make_data.synth.code import CHARS_PER_TOKEN, Part, code_rows
from ds_longft.tools.make_data.synth.needle_rows import needle_rows
from ds_longft.tools.make_data.synth.needle_tasks import TASKS, Task
from ds_longft.tools.make_data.synth.refgpt8x import MEAN_REFERENCES, hide_references, sentence_embedder
from ds_longft.tools.make_data.synth.sources import read_dialogues, read_documents
from ds_longft.tools.make_data.where import Where, parse_where

MEASURED_TOGETHER = 16  # rows; the tokenizer works on them in parallel


def refgpt8x(
    source: str,
    out: str,
    *,
    rows: int | None = None,
    mean_references: float = MEAN_REFERENCES,
    embedding: str | None = None,
    seed: int = 0,
    name: str = "refgpt8x",
    json: bool = False,
) -> None:
    """Grow dialogues about a reference: it is hidden among its nearest neighbours, K ~ Poisson(8) texts in all.

    Args:
        source: set with references: RefGPT-Fact, {reference, messages}, {context, qas} or {document, question, answer}.
        out: JSONL file to write.
        rows: how many dialogues to take. Left out: as many as keep the amount of text, dialogues / mean.
        mean_references: mean of the Poisson distribution.
        embedding: sentence-transformers model to find neighbours by. Left out: TF-IDF.
        seed: the same seed gives the same rows.
        name: written to each row as its source.
        json: print one JSON object instead of a line.
    """
    if mean_references <= 0 or (rows is not None and rows < 1):
        raise ConfigError(f"--rows is {rows}, --mean_references is {mean_references}: expected numbers above 0")
    with Ledger(Path(f"{out}.ledger.jsonl")) as ledger:
        dialogues = read_dialogues(SourceConfig(path=source), ledger)
        count = rows or max(1, round(len(dialogues) / mean_references))
        made = hide_references(
            dialogues,
            rows=count,
            seed=seed,
            name=name,
            mean_references=mean_references,
            embed=sentence_embedder(embedding) if embedding else None,
        )
        write_made(made, out, Lengths(), ledger, json=json)


def needle(
    source: str,
    out: str,
    *,
    rows: int = 1000,
    context_tokens: int | str = "32K",
    questions: int = 3,
    tasks: str = ",".join(TASKS),
    where: str | None = None,
    exclude: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    name: str = "needle",
    json: bool = False,
) -> None:
    """Ask about real long documents, English or Chinese, what a program can check.

    recall: copy a sentence. location: which paragraph. count: how often. chain: follow 2 to 4 notes hidden in the
    text. absent: not in the text. Each answer is found a second time from the finished text, or the row is not written.

    Args:
        source: set of plain texts, or of references.
        out: JSONL file to write.
        rows: how many.
        context_tokens: longest row, e.g. 128K; lengths are drawn between it and a quarter of it.
        questions: asked of one context, one after the other.
        tasks: which of them, comma separated.
        where: column=value, rows of the source to take.
        exclude: column=value, rows of the source to leave out.
        tokenizer: folder or hub id of a model, to count lengths exactly. Left out: lengths are estimated.
        seed: the same seed gives the same rows.
        name: written to each row as its source.
        json: print one JSON object instead of a line.
    """
    chosen: list[Task] = [task for task in TASKS if task in tasks.replace(" ", "").split(",")]
    unknown = sorted(set(tasks.replace(" ", "").split(",")) - set(TASKS))
    if unknown or rows < 1 or questions < 1:
        seen = f"--tasks is {tasks}, --rows is {rows}, --questions is {questions}"
        raise ConfigError(f"{seen}: expected tasks among {', '.join(TASKS)}, and numbers of 1 or more")
    longest = context_length(context_tokens)
    lengths = Lengths(load_tokenizer(tokenizer) if tokenizer else None)
    taken = Where(parse_where("--where", where), parse_where("--exclude", exclude))
    with Ledger(Path(f"{out}.ledger.jsonl")) as ledger:
        made = needle_rows(
            read_documents(SourceConfig(path=source), ledger, taken),
            rows=rows,
            context_tokens=longest,
            seed=seed,
            name=name,
            questions=questions,
            tasks=chosen,
            lengths=lengths,
        )
        write_made(made, out, lengths, ledger, json=json)


def code(
    out: str,
    *,
    rows: int = 200,
    context_tokens: int | str = "4K",
    questions: int = 1,
    seed: int = 0,
    part: Part = "train",
    tokenizer: str | None = None,
    name: str = "code",
    json: bool = False,
) -> None:
    """Write a long-code set made of the Python standard library's source on this machine.

    Args:
        out: JSONL file to write, in `messages` form.
        rows: how many.
        context_tokens: longest row, e.g. 4096 or 128K.
        questions: how many are asked of one context, one after the other.
        seed: the same seed gives the same rows on the same Python.
        part: train or eval; the two never share a module.
        tokenizer: folder or hub id of a model, to fill the length exactly. Left out: lengths are estimated.
        name: written to each row as its source.
        json: print one JSON object instead of a line.
    """
    tokens = context_length(context_tokens)
    if rows < 1 or questions < 1:
        raise ConfigError(f"--rows is {rows}, --questions is {questions}: expected 1 or more")
    if part not in ("train", "eval"):
        raise ConfigError(f"--part is {part!r}: expected train or eval")
    lengths = Lengths(load_tokenizer(tokenizer) if tokenizer else None, CHARS_PER_TOKEN)
    made = code_rows(
        rows=rows, context_tokens=tokens, questions=questions, seed=seed, part=part, lengths=lengths, name=name
    )
    write_made(made, out, lengths, json=json)


def agents(
    out: str,
    *,
    rows: int = 200,
    shortest_tokens: int | str = "20K",
    context_tokens: int | str = "128K",
    tokenizer: str | None = None,
    seed: int = 0,
    name: str = "agents",
    json: bool = False,
) -> None:
    """Trajectories of an agent that finds a number in a small file system: tools, thinking, calls and their results.

    Args:
        out: JSONL file to write.
        rows: how many.
        shortest_tokens: of the shortest row, about.
        context_tokens: of the longest row, about: the last file that is read may go beyond it by a few thousand.
        tokenizer: folder or hub id of a model whose template writes tools, to count lengths. Left out: estimates.
        seed: the same seed gives the same rows.
        name: written to each row as its source.
        json: print one JSON object instead of a line.
    """
    longest, shortest = context_length(context_tokens), context_length(shortest_tokens)
    if rows < 1 or shortest > longest:
        raise ConfigError(
            f"--rows is {rows}, --shortest_tokens {shortest}, --context_tokens {longest}: expected at least one row, "
            "and the second at most the third"
        )
    lengths = Lengths(load_tokenizer(tokenizer) if tokenizer else None)
    made = agent_rows(
        rows=rows, shortest_tokens=shortest, longest_tokens=longest, seed=seed, lengths=lengths, name=name
    )
    write_made(made, out, lengths, json=json)


def context_length(given: int | str, flag: str = "--context_tokens") -> int:
    """Tokens of a flag. Raises ConfigError."""
    tokens = parse_tokens(given)
    if not isinstance(tokens, int) or tokens <= 0:
        raise ConfigError(f"{flag} is {given!r}: expected a number of tokens, e.g. 4096 or 128K")
    return tokens


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
