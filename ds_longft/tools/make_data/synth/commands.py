"""What `ds-longft data synth refgpt8x|needle|code|agents` do: samples made of sets and texts, written as rows."""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ds_longft.command_line import tokens_of
from ds_longft.config.run_config import SourceConfig
from ds_longft.data.formats import to_row
from ds_longft.data.ledger import Ledger
from ds_longft.errors import ConfigError
from ds_longft.tools.make_data.commands import reasons
from ds_longft.tools.make_data.convert import written_whole
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.agents import agent_rows
from ds_longft.tools.make_data.synth.code import CHARS_PER_TOKEN, Part, code_rows
from ds_longft.tools.make_data.synth.flags_of_synth import Made, MadeOfTexts, Named
from ds_longft.tools.make_data.synth.needle_rows import needle_rows
from ds_longft.tools.make_data.synth.needle_tasks import TASKS, Task
from ds_longft.tools.make_data.synth.refgpt8x import MEAN_REFERENCES, hide_references, sentence_embedder
from ds_longft.tools.make_data.synth.sources import read_dialogues, read_documents

MEASURED_TOGETHER = 16  # rows; the tokenizer works on them in parallel

REFGPT8X = Named("refgpt8x")
NEEDLE = MadeOfTexts("needle")
CODE = Made("code", rows=200, context_tokens="4K")
AGENTS = Made("agents", rows=200, context_tokens="128K")


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
        out: JSONL file to write.
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
    source: str, out: str, *, questions: int = 3, tasks: str = ",".join(TASKS), flags: MadeOfTexts = NEEDLE
) -> None:
    """Ask about real long documents, English or Chinese, what a program can check.

    recall: copy a sentence. location: which paragraph. count: how often. chain: follow 2 to 4 notes hidden in the
    text. absent: not in the text. Each answer is found a second time from the finished text, or the row is not written.
    Lengths are drawn between --context_tokens and a quarter of it.

    Args:
        source: set of plain texts, or of references.
        out: JSONL file to write.
        questions: asked of one context, one after the other.
        tasks: which of them, comma separated.
    """
    asked = tasks.replace(" ", "").split(",")
    if set(asked) - set(TASKS) or questions < 1:
        seen = f"--tasks is {tasks}, --questions is {questions}"
        raise ConfigError(f"{seen}: expected tasks among {', '.join(TASKS)}, and 1 or more questions")
    chosen: list[Task] = [task for task in TASKS if task in asked]
    write_of_texts(source, out, flags, partial(needle_rows, questions=questions, tasks=chosen))


def code(out: str, *, questions: int = 1, part: Part = "train", flags: Made = CODE) -> None:
    """Write a long-code set made of the Python standard library's source on this machine.

    The same seed gives the same rows on the same Python.

    Args:
        out: JSONL file to write, in `messages` form.
        questions: how many are asked of one context, one after the other.
        part: train or eval; the two never share a module.
    """
    if questions < 1:
        raise ConfigError(f"--questions is {questions}: expected 1 or more")
    if part not in ("train", "eval"):
        raise ConfigError(f"--part is {part!r}: expected train or eval")
    shared, lengths = flags.shared(), flags.lengths(CHARS_PER_TOKEN)
    write_made(code_rows(questions=questions, part=part, lengths=lengths, **shared), out, lengths, json=flags.json)


def agents(out: str, *, shortest_tokens: int | str = "20K", flags: Made = AGENTS) -> None:
    """Trajectories of an agent that finds a number in a small file system: tools, thinking, calls and their results.

    Lengths are met about: the last file that is read may go beyond the longest by a few thousand tokens. A tokenizer
    that counts them needs a chat template that writes tools.

    Args:
        out: JSONL file to write.
        shortest_tokens: of the shortest row, about.
    """
    shared, shortest = flags.shared(), tokens_of("--shortest_tokens", shortest_tokens)
    longest = shared.pop("context_tokens")
    if shortest > longest:
        raise ConfigError(
            f"--shortest_tokens is {shortest}, --context_tokens {longest}: expected the first at most the second"
        )
    lengths = flags.lengths()
    made = agent_rows(shortest_tokens=shortest, longest_tokens=longest, lengths=lengths, **shared)
    write_made(made, out, lengths, json=flags.json)


def write_of_texts(source: str, out: str, flags: MadeOfTexts, make: Callable[..., Iterator[dict[str, Any]]]) -> None:
    """Write the rows that `make` makes of the documents of a source and of what every maker takes."""
    shared, taken, lengths = flags.shared(), flags.taken, flags.lengths()
    with Ledger(Path(f"{out}.ledger.jsonl")) as ledger:
        documents = read_documents(SourceConfig(path=source), ledger, taken)
        write_made(make(documents, lengths=lengths, **shared), out, lengths, ledger, json=flags.json)


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
