"""What `ds-longft data synth stretches` does: long rows of running texts, in wanted lengths and languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_longft.config.run_config import SourceConfig
from ds_longft.data.ledger import Ledger
from ds_longft.errors import ConfigError
from ds_longft.tools.look.commands import load_tokenizer
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.commands import context_length, write_made
from ds_longft.tools.make_data.synth.negatives import negative_rows
from ds_longft.tools.make_data.synth.refgpt8x import sentence_embedder
from ds_longft.tools.make_data.synth.row_plan import size_parts
from ds_longft.tools.make_data.synth.sources import read_documents
from ds_longft.tools.make_data.synth.stretches import stretch_rows
from ds_longft.tools.make_data.where import Where, parse_where


def stretches(
    source: str,
    out: str,
    *,
    rows: int = 1000,
    context_tokens: int | str = "32K",
    sizes: str | None = None,
    languages: str | None = None,
    where: str | None = None,
    exclude: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    name: str = "stretches",
    json: bool = False,
) -> None:
    """Cut long texts into plain-text rows of many lengths; texts of one language are laid one behind the other.

    Args:
        source: set of plain texts, or of references; a file, a folder, or a pattern in quotes.
        out: JSONL file to write.
        rows: how many. Two rows may overlap.
        context_tokens: longest row, e.g. 128K.
        sizes: part of the longest row and its share, e.g. 1/4:3,1/2:2,1:2. Left out: halves of halves down to 1/32.
        languages: shares of the rows, e.g. zh:0.15; others as there is text.
        where: column=value, rows of the source to take.
        exclude: column=value, rows of the source to leave out.
        tokenizer: folder or hub id of a model, to fill lengths exactly. Left out: lengths are estimated.
        seed: the same seed gives the same rows.
        name: written to each row as its source.
        json: print one JSON object instead of a line.
    """
    shared = of_running_texts(rows, context_tokens, sizes, languages, seed, name, tokenizer)
    taken = Where(parse_where("--where", where), parse_where("--exclude", exclude))
    with Ledger(Path(f"{out}.ledger.jsonl")) as ledger:
        documents = read_documents(SourceConfig(path=source), ledger, taken)
        write_made(stretch_rows(documents, **shared), out, shared["lengths"], ledger, json=json)


def negatives(
    source: str,
    out: str,
    *,
    rows: int = 1000,
    context_tokens: int | str = "32K",
    part_tokens: int | str = "2K",
    separator: str = "\\n\\n",
    where: str | None = None,
    exclude: str | None = None,
    tokenizer: str | None = None,
    embedding: str | None = None,
    seed: int = 0,
    name: str = "negatives",
    json: bool = False,
) -> None:
    """Put near neighbours of other documents between a document's parts: what belongs together lies far apart.

    Each row is one document of two parts or more, in its order, up to half of the row; the rest of it are the parts of
    other documents that are most like the part before them.

    Args:
        source: set of plain texts, or of references; a file, a folder, or a pattern in quotes.
        out: JSONL file to write.
        rows: how many documents; none is drawn twice.
        context_tokens: longest row, e.g. 128K.
        part_tokens: of a part.
        separator: what stands between parts; \\n is a line break.
        where: column=value, rows of the source to take.
        exclude: column=value, rows of the source to leave out.
        tokenizer: folder or hub id of a model, to count lengths exactly. Left out: lengths are estimated.
        embedding: folder or hub id of a sentence-transformers model that finds neighbours. Left out: TF-IDF.
        seed: the same seed gives the same rows.
        name: written to each row as its source.
        json: print one JSON object instead of a line.
    """
    longest, part = context_length(context_tokens), context_length(part_tokens, "--part_tokens")
    if rows < 1 or 4 * part > longest:
        seen = f"--rows is {rows}, --context_tokens is {context_tokens}, --part_tokens is {part_tokens}"
        raise ConfigError(f"{seen}: expected 1 or more rows, and room for four parts in one")
    taken = Where(parse_where("--where", where), parse_where("--exclude", exclude))
    lengths = Lengths(load_tokenizer(tokenizer) if tokenizer else None)
    with Ledger(Path(f"{out}.ledger.jsonl")) as ledger:
        made = negative_rows(
            read_documents(SourceConfig(path=source), ledger, taken), rows=rows, context_tokens=longest,
            part_tokens=part, seed=seed, name=name, separator=separator.replace("\\n", "\n"), lengths=lengths,
            embed=sentence_embedder(embedding) if embedding else None,
        )  # fmt: skip
        write_made(made, out, lengths, ledger, json=json)


def of_running_texts(
    rows: int,
    context_tokens: int | str,
    sizes: str | None,
    languages: str | None,
    seed: int,
    name: str,
    tokenizer: str | None,
) -> dict[str, Any]:
    """What rows made of running texts take: `stretch_rows`, and what else is made like them. Raises ConfigError."""
    if rows < 1:
        raise ConfigError(f"--rows is {rows}: expected 1 or more")
    parts = parse_shares("--sizes", sizes, "1/4:3,1:1") if sizes else None
    size_parts(parts or {})
    shares = parse_shares("--languages", languages, "zh:0.15") if languages else {}
    if sum(shares.values()) > 1.000001:
        raise ConfigError(f"--languages is {languages}: the shares add up to more than 1")
    return {
        "rows": rows,
        "context_tokens": context_length(context_tokens),
        "sizes": parts,
        "languages": shares,
        "seed": seed,
        "name": name,
        "lengths": Lengths(load_tokenizer(tokenizer) if tokenizer else None),
    }


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
