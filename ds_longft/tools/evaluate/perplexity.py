"""`ds-longft eval perplexity`: the loss at every position of long texts, one text over several GPUs if need be.

A model that uses its context gets better with position; one that is lost beyond its window gets much worse there.

LongPPL (arXiv 2410.23771) is perplexity over the tokens that what stands far before them helps to predict. An evaluator
reads each text whole, and with a short context alone. Its key tokens are those that the short context costs more than
`GAIN` nats, and that it predicts well from the whole text. Any model's perplexity over them is its LongPPL: numbers of
one evaluator compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from ds_longft.errors import ConfigError, DataError
from ds_longft.run_files import EvaluationRow
from ds_longft.stored import read_lines
from ds_longft.tools.evaluate.evaluation import Result, Row, evaluate_on_ranks, fingerprint
from ds_longft.tools.evaluate.flags import FLAGS, Flags, positive, print_tables, tokens_of
from ds_longft.tools.evaluate.texts import CHARACTERS_A_TOKEN, Language, adds_bos, encode, read_texts

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

SHOWN_PARTS = 8
GAIN, MOST = 2.0, 2.0  # nats, as published: what the far context gains at least, the loss with it at most
STEP = 4  # a window predicts a fourth of the short context behind it: 1,024 tokens with 4,096 published


def perplexity(
    model: str,
    *,
    text: str | None = None,
    length: int | str | None = None,
    texts: int = 8,
    window: int | str | None = None,
    short: int | str | None = None,
    key_tokens: str | None = None,
    buckets: int = 64,
    where: str | None = None,
    join: bool = False,
    language: Language = "en",
    flags: Flags = FLAGS,
) -> None:
    """Measure the mean loss of every stretch of positions over long texts; with --sp N each is split over N GPUs.

    Args:
        text: text file, JSONL or folder. Left out: the Python documentation of this machine.
        length: tokens of each text, e.g. 32K or 128K. Left out: the model's window.
        texts: how many texts of that length, spread evenly over what is there.
        window: read each text in overlapping windows of N tokens, each token with a quarter of one to a whole one
            before it. With --before and the window of the model before: what that model can do on the same text. Left
            out: each text whole.
        short: measure LongPPL too, with key tokens that this model finds: each token read with so many tokens before it
            (published: 4K) to a quarter more.
        key_tokens: measure LongPPL on the key tokens of another model: the rows of its --short on these texts.
        buckets: stretches of positions that the loss is averaged in.
        where: column=value, rows to take.
        join: lay all texts together as one ring, and begin at evenly spaced places of it: where --texts of them cover
            it more than once, each place is read at several positions, so that positions differ by the model and not by
            the text at them. Left out: shorter texts are left out.
        language: of the built-in text.
    """
    arguments = dict(locals())
    positive(buckets=buckets, texts=texts)
    if flags.server is not None:
        raise ConfigError("--server gives answers, not the loss of texts: leave it out")
    if length is not None and tokens_of("--length", length) < 2:
        raise ConfigError(f"--length is {length}: a text of one token has none to predict, give 2 or more")
    if window is not None and tokens_of("--window", window) < 8:
        raise ConfigError(f"--window is {window}: expected 8 or more tokens, e.g. 8K")
    if short is not None and (key_tokens is not None or tokens_of("--short", short) < STEP):
        raise ConfigError(f"--short is {short}: expected {STEP} or more tokens, e.g. 4K, and no --key_tokens beside it")

    told = {
        "text": text or f"built in, {language}",
        "where": where,
        "join": join,
        "window_tokens": None if window is None else tokens_of("--window", window),
        "buckets": buckets,
    }
    if short is not None or key_tokens is not None:
        told |= {"short_tokens": None if short is None else tokens_of("--short", short), "key_tokens": key_tokens}
    given = None if length is None else tokens_of("--length", length)

    def measure(answering: Answering) -> Result:
        tokens = given or answering.window or 8192
        source = read_texts(text, language, where=where, characters=CHARACTERS_A_TOKEN * tokens * texts)
        return _measure(
            answering, pieces_of(answering.tokenizer, source, tokens, texts, join=join or text is None), told
        )

    evaluate_on_ranks("eval perplexity", arguments, measure, _show)


def _measure(answering: Answering, pieces: list[list[int]], told: dict[str, Any]) -> Result:
    tokens, buckets, short, keys_of = len(pieces[0]), told["buckets"], told.get("short_tokens"), told.get("key_tokens")
    bucket = np.arange(1, tokens) * buckets // tokens  # of each predicted token
    of_texts = fingerprint(pieces)
    settings = {**told, "length_tokens": tokens, "texts": len(pieces), "texts_fingerprint": of_texts}
    keys = read_key_tokens(keys_of, of_texts, len(pieces)) if keys_of else {}
    if short or keys_of:
        settings["key_tokens_fingerprint"] = fingerprint([keys])

    def losses(key: str) -> list[Row]:
        piece, of_keys = pieces[int(key)], dict[str, Any]()
        whole = answering.losses(piece, told["window_tokens"])
        if short or keys_of:
            near = answering.losses(piece, short + short // STEP, short) if short else whole
            places = key_places(whole, near) if short else keys[key]
            of_keys = {"key_tokens": places, "key_loss_sum": float(whole[places].sum())}
        each = whole[1:]
        sums, counts = np.bincount(bucket, each, minlength=buckets), np.bincount(bucket, minlength=buckets)
        return [{"key": key, "loss_sums": sums.tolist(), "targets": counts.tolist(), **of_keys}]

    answering.add(answering.open_rows("perplexity", settings, [str(i) for i in range(len(pieces))]), losses)

    def summary(rows: list[Row]) -> Row:
        return summarize(rows, tokens, buckets) | (longppl(rows) if short or keys_of else {})

    return answering.finish("perplexity", summary)


def key_places(long: NDArray[np.float64], short: NDArray[np.float64]) -> list[int]:
    """Places of the key tokens, from the evaluator's losses [tokens] with all before each and the short context."""
    found: list[int] = np.flatnonzero((short - long > GAIN) & (long < MOST)).tolist()
    return found


def read_key_tokens(file: str, texts_fingerprint: str, texts: int) -> dict[str, list[int]]:
    """Key tokens of each text, of an earlier `eval perplexity --short` of the evaluator on these texts.

    Raises:
        ConfigError: there are none, not of all texts, or of others.
    """
    lines = read_lines(Path(file), EvaluationRow)[0]
    found = {line["key"]: line["key_tokens"] for line in lines if "key_tokens" in line}
    if len(found) < texts or lines[0].get("settings", {}).get("texts_fingerprint") != texts_fingerprint:
        raise ConfigError(
            f"--key_tokens {file}: expected the rows of `eval perplexity EVALUATOR --short 4K` on the same texts, e.g. "
            "RUN/eval/perplexity.rows.jsonl"
        )
    return found


def longppl(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all texts together; None where they have no key token."""
    count = sum(len(row["key_tokens"]) for row in rows)
    loss = sum(row["key_loss_sum"] for row in rows) / count if count else None
    return {"longppl": None if loss is None else round(math.exp(loss), 3), "key_tokens": count}


def pieces_of(tokenizer: Any, texts: list[str], tokens: int, count: int, *, join: bool) -> list[list[int]]:
    """Pieces of exactly `tokens` tokens, spread evenly over the texts.

    With `join`, `count` of them from evenly spaced places of all texts laid to a ring, which may overlap; without, at
    most `count` that do not.

    Raises:
        DataError: no text is that long.
    """
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    body = tokens - len(bos)
    streams = [encode(tokenizer, f"{text}\n\n" if join else text) for text in texts]
    streams = [list(chain.from_iterable(streams))] if join else streams
    longest = max(map(len, streams), default=0)
    if longest < body:
        hint = "" if join else ", lay shorter ones together with --join"
        raise DataError(f"no text has {tokens:,} tokens (the longest has {longest:,}): lower --length{hint}")
    if join:
        twice = streams[0] + streams[0]
        return [bos + twice[a : a + body] for a in (i * longest // count for i in range(count))]
    starts = [(i, a) for i, ids in enumerate(streams) for a in range(0, len(ids) - body + 1, body)]
    chosen = starts if len(starts) <= count else [starts[i * len(starts) // count] for i in range(count)]
    return [bos + streams[i][a : a + body] for i, a in chosen]


def summarize(rows: Sequence[dict[str, Any]], tokens: int, buckets: int) -> dict[str, Any]:
    """Mean loss (nats per token) of each bucket, of the eighths, of doubling ranges, and of everything."""
    losses = np.sum([row["loss_sums"] for row in rows], axis=0)
    counts = np.sum([row["targets"] for row in rows], axis=0)
    edges = [round(i * tokens / buckets) for i in range(buckets + 1)]

    def mean(a: int, b: int) -> float | None:
        """Over the buckets between two positions; None where one of them lies inside a bucket."""
        inside = [i for i in range(buckets) if edges[i] >= a and edges[i + 1] <= b] if {a, b} <= set(edges) else []
        total = counts[inside].sum() if inside else 0
        return round(float(losses[inside].sum() / total), 4) if total else None

    parts = [round(i * tokens / SHOWN_PARTS) for i in range(SHOWN_PARTS + 1)]
    doubling = [1 << i for i in range(20) if tokens / buckets <= 1 << i < tokens] + [tokens]
    ends = [min(edges, key=lambda edge: abs(edge - at)) for at in doubling]  # of buckets, where they are no powers of 2
    ranges = {f"{a}-{b}": mean(a, b) for a, b in zip([0, *ends], ends, strict=False)}
    return {
        "length_tokens": tokens,
        "texts": len(rows),
        "loss": mean(0, tokens),
        "perplexity": round(math.exp(float(losses.sum() / counts.sum())), 3),
        "edges_tokens": edges,
        "loss_by_bucket": [mean(edges[i], edges[i + 1]) for i in range(buckets)],
        "loss_by_eighth": [mean(parts[i], parts[i + 1]) for i in range(SHOWN_PARTS)],
        "loss_by_range": {key: value for key, value in ranges.items() if value is not None},
    }


def _show(result: dict[str, Any], path: Path) -> None:
    tokens = result["length_tokens"]
    table = Table("positions", "loss", "perplexity", title=f"{result['texts']} texts of {tokens:,} tokens")
    for i, value in enumerate(result["loss_by_eighth"]):
        if value is not None:
            first, last = i * tokens // SHOWN_PARTS, (i + 1) * tokens // SHOWN_PARTS
            table.add_row(f"{first:,} - {last:,}", f"{value:.4f}", f"{math.exp(value):.2f}")
    table.add_section()
    table.add_row("all", f"{result['loss']:.4f}", f"{result['perplexity']:.2f}", style="bold")
    if result.get("longppl"):
        table.add_row(f"LongPPL, {result['key_tokens']:,} key tokens", "", f"{result['longppl']:.2f}", style="bold")
    print_tables(path, table)
