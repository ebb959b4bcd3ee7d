"""What `ds-longft data convert|mix|synth` do: from published sets and texts to the rows that are trained on."""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_longft.config import DataConfig, SourceConfig, parse_tokens
from ds_longft.data.commands import load_tokenizer, show, write_pages
from ds_longft.data.convert import PREFERENCE, convert_set, written_whole
from ds_longft.data.formats import FORMATS
from ds_longft.data.ledger import Ledger, Tally
from ds_longft.data.lengths import Lengths
from ds_longft.data.mix import Mixed, mix_sources
from ds_longft.data.recipe import read_recipe
from ds_longft.data.rows import Turn
from ds_longft.data.statistics import statistics
from ds_longft.data.synth.code import Part, write_code_set
from ds_longft.data.synth.needle import needle_rows
from ds_longft.data.synth.needle_tasks import TASKS, Task
from ds_longft.data.synth.refgpt8x import MEAN_REFERENCES, hide_references, sentence_embedder
from ds_longft.data.synth.sources import read_dialogues, read_documents
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import ConfigError
from ds_longft.yaml_io import dump_yaml


def convert(
    source: str,
    out: str,
    *,
    format: str = "auto",
    split: str = "train",
    limit: int | None = None,
    name: str | None = None,
    max_bad_fraction: float = 0.01,
    json: bool = False,
) -> None:
    """Turn a published set into rows that every other command takes: messages, plain text, or preference pairs.

    Known by their columns: LongAlign, LongAlpaca and alpaca, RefGPT-Fact (and -8x), anti-haystack, Fusang and ShareGPT,
    messages, prompt and completion, reading comprehension, plain text; orca, ultrafeedback-binarized, truthy-dpo and
    Chinese-dpo-pairs become pairs {prompt, chosen, rejected}. Rows that cannot be used are listed in OUT.ledger.jsonl.

    Args:
        source: a JSON, JSONL or parquet file (.gz too), a folder of them, or a hub id.
        out: JSONL file to write.
        format: row layout, where the first row's columns do not tell.
        split: split of a hub set, or the name of one of its configurations.
        limit: take only the first so many rows.
        name: written to each row as its source. Left out: the name of the source.
        max_bad_fraction: fail when more than this share of the rows is unusable.
        json: print one JSON object instead of a line.
    """
    if format not in ("auto", PREFERENCE, *FORMATS):
        raise ConfigError(f"--format is {format!r}: expected auto, {PREFERENCE}, {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}: expected 1 or more")
    config = SourceConfig(path=source, split=split, limit=limit).model_copy(update={"format": format})
    done = convert_set(config, out, name=name or _stem(source), max_bad_fraction=max_bad_fraction, progress=not json)
    if json:
        print(json_text.dumps(asdict(done)))
        return
    languages = ", ".join(f"{count:,} {code}" for code, count in sorted(done.languages.items()))
    print(f"{done.path}: {done.tally.usable:,} {done.format} rows ({languages})")
    if done.tally.bad_rows:
        print(f"{done.ledger}: {_reasons(done.tally)}")


def mix(
    recipe: str,
    out: str,
    *,
    root: str | None = None,
    tokenizer: str | None = None,
    seed: int | None = None,
    json: bool = False,
) -> None:
    """Make a training set out of many sources: shares, languages, lengths, near duplicates, held-out texts.

    Writes OUT/train.jsonl, eval.jsonl, ledger.jsonl and mix.json. With a tokenizer it goes on to the end: the sets are
    tokenized, OUT/run.yaml is a run config for them, and OUT/stats.html shows what a run will see, packs included.

    Args:
        recipe: YAML file; recipes/faro.yaml comes with the package.
        out: folder to write.
        root: where relative paths of the recipe are looked for, and files named like its sources (NAME.jsonl, ...).
        tokenizer: model folder or hub id to count lengths with. Left out: the recipe's; else they are estimated.
        seed: instead of the recipe's.
        json: print one JSON object instead of tables.
    """
    found = read_recipe(recipe, tokenizer=tokenizer, seed=seed)
    if root is not None and not Path(root).expanduser().is_dir():
        raise ConfigError(f"--root is {root}: there is no such folder")
    loaded = load_tokenizer(found.tokenizer) if found.tokenizer else None
    folder = Path(out)
    below = Path(root).expanduser() if root is not None else None
    mixed = mix_sources(found, folder, tokenizer=loaded, root=below, progress=not json)
    if not json:
        _show_mixed(mixed)
    if loaded is not None and found.tokenizer is not None:
        run = {
            "model": {"path": found.tokenizer},
            "data": {
                "train": [{"path": str(Path(mixed.train).resolve())}],
                "eval": [{"path": str(Path(mixed.eval).resolve())}] if mixed.eval else [],
                "max_length_tokens": found.max_length_tokens,
            },
        }
        (folder / "run.yaml").write_text(dump_yaml(run), encoding="utf-8")
        data = DataConfig.model_validate(run["data"])
        rows = tokenize_sources(data.train, loaded, data, progress=not json)
        numbers = statistics(rows, data, dp=1, sp=1, accumulation=1, seed=0)
        write_pages(
            numbers, html=str(folder / "stats.html"), png=None, title="Training data", note=f"mixed by {recipe}"
        )
        if not json:
            show(numbers)
            print(
                f"{folder}/stats.html shows it all; train on it: deepspeed launch/train.py --config {folder}/run.yaml"
            )
    if json:
        print(json_text.dumps(asdict(mixed)))


def synth_refgpt8x(
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
        _write_made(made, out, Lengths(), ledger, json)


def synth_needle(
    source: str,
    out: str,
    *,
    rows: int = 1000,
    context_tokens: int | str = "32K",
    questions: int = 3,
    tasks: str = ",".join(TASKS),
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
    longest = _tokens(context_tokens)
    lengths = Lengths(load_tokenizer(tokenizer) if tokenizer else None)
    with Ledger(Path(f"{out}.ledger.jsonl")) as ledger:
        made = needle_rows(
            read_documents(SourceConfig(path=source), ledger),
            rows=rows,
            context_tokens=longest,
            seed=seed,
            name=name,
            questions=questions,
            tasks=chosen,
            lengths=lengths,
        )
        _write_made(made, out, lengths, ledger, json)


def synth_code(
    path: str,
    *,
    rows: int = 200,
    context_tokens: int | str = "4K",
    questions: int = 1,
    seed: int = 0,
    part: Part = "train",
    tokenizer: str | None = None,
    json: bool = False,
) -> None:
    """Write a long-code set made of the Python standard library's source on this machine.

    Args:
        path: JSONL file to write, in `messages` form.
        rows: how many.
        context_tokens: longest row, e.g. 4096 or 128K.
        questions: how many are asked of one context, one after the other.
        seed: the same seed gives the same rows on the same Python.
        part: train or eval; the two never share a module.
        tokenizer: folder or hub id of a model, to fill the length exactly. Left out: lengths are estimated.
        json: print one JSON object instead of a line.
    """
    tokens = _tokens(context_tokens)
    if questions < 1:
        raise ConfigError(f"--questions is {questions}: expected 1 or more")
    if part not in ("train", "eval"):
        raise ConfigError(f"--part is {part!r}: expected train or eval")
    loaded = load_tokenizer(tokenizer) if tokenizer else None
    done = write_code_set(
        path, rows=rows, context_tokens=tokens, questions=questions, seed=seed, part=part, tokenizer=loaded
    )
    if json:
        print(json_text.dumps(asdict(done)))
        return
    about = "" if tokenizer else " (estimated)"
    print(f"{done.path}: {done.rows} rows of {done.shortest_tokens:,} to {done.longest_tokens:,} tokens{about}")


def _tokens(given: int | str) -> int:
    tokens = parse_tokens(given)
    if not isinstance(tokens, int) or tokens <= 0:
        raise ConfigError(f"--context_tokens is {given!r}: expected a number of tokens, e.g. 4096 or 128K")
    return tokens


def _stem(source: str) -> str:
    """my/set.jsonl.gz -> set, THUDM/LongAlign-10k -> LongAlign-10k."""
    name = Path(source).name
    for suffix in (".gz", ".jsonl", ".ndjson", ".json", ".parquet"):
        name = name.removesuffix(suffix)
    return name


def _write_made(made: Iterator[dict[str, Any]], out: str, lengths: Lengths, ledger: Ledger, json: bool) -> None:
    """Write made rows and say how long they are."""
    tokens = []
    with written_whole(Path(out)) as file:
        for record in made:
            turns = [
                Turn("assistant" if m["role"] == "assistant" else "user", m["content"]) for m in record["messages"]
            ]
            tokens += lengths.rows([turns])
            file.write(json_text.dumps(record, ensure_ascii=False) + "\n")
    facts = {
        "path": out,
        "rows": len(tokens),
        "shortest_tokens": min(tokens),
        "median_tokens": int(np.median(tokens)),
        "longest_tokens": max(tokens),
        "exact_lengths": lengths.exact,
        "unusable_source_rows": ledger.tally.bad_rows,
    }
    if json:
        print(json_text.dumps(facts))
        return
    about = "" if lengths.exact else " (estimated)"
    print(f"{out}: {len(tokens):,} rows of {min(tokens):,} to {max(tokens):,} tokens{about}")
    if ledger.tally.bad_rows:
        print(f"{ledger.path}: {_reasons(ledger.tally)}")


def _reasons(tally: Tally) -> str:
    parts = ", ".join(f"{count:,} x {reason}" for reason, count in tally.bad.items())
    return f"{tally.bad_rows:,} of {tally.read:,} rows left out: {parts}"


def _show_mixed(mixed: Mixed) -> None:
    table = Table("of", "is", "there", "wanted", "taken", "share", "held out")
    last = mixed.kinds[0]["of"]
    for kind in mixed.kinds:
        if kind["of"] != last:
            table.add_section()
            last = kind["of"]
        used_up = " (all)" if kind["rows"] == kind["pool"] else ""
        table.add_row(
            kind["of"],
            Text(kind["is"]),
            f"{kind['pool']:,}",
            "" if kind["wanted"] is None else f"{kind['wanted']:.1%}",
            f"{kind['rows']:,}{used_up}",
            f"{kind['share']:.1%}",
            f"{kind['held_out']:,}",
        )
    Console().print(table)
    about = "" if mixed.exact_lengths else " (estimated)"
    print(f"{mixed.train}: {mixed.train_rows:,} rows; held out: {mixed.eval_rows:,}; {mixed.tokens:,} tokens{about}")
    for reason, count in mixed.left_out.items():
        print(f"  left out: {count:,} x {reason} ({mixed.ledger})")
