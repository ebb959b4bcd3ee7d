"""`ds-longft eval perplexity`: the loss at every position of long texts, one text over several GPUs if need be.

A model that uses its context gets better with position; one that is lost beyond its window gets much worse there.
"""

from __future__ import annotations

import json as json_text
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ds_longft.errors import ConfigError, DataError
from ds_longft.ranks.join import Launch
from ds_longft.tools.evaluate.needle import CHARACTERS_A_TOKEN, tokens_of
from ds_longft.tools.evaluate.processes import said_once, start_ranks
from ds_longft.tools.evaluate.texts import Language, adds_bos, encode, read_texts, token_stream

SHOWN_PARTS = 8


def perplexity(
    model: str,
    *,
    text: str | None = None,
    length: int | str | None = None,
    texts: int = 8,
    window: int | str | None = None,
    buckets: int = 64,
    where: str | None = None,
    join: bool = False,
    language: Language = "en",
    sp: int = 1,
    kernel: str = "auto",
    before: bool = False,
    base: str | None = None,
    out: str | None = None,
    name: str | None = None,
    json: bool = False,
) -> None:
    """Measure the mean loss of every stretch of positions over long texts.

    The result goes to RUN/eval/perplexity.json (perplexity-before.json with --before). Stopped and started again with
    the same settings, it goes on. With --sp N it starts N ranks itself, one a GPU, and every text is split over them;
    under a launcher (`deepspeed --no_local_rank --module ds_longft.cli eval perplexity ... --sp 8`) it takes that one's
    ranks, and several texts at a time where there are more than sp.

    Args:
        model: output folder of a run, adapter, model folder or hub id.
        text: text file, JSONL or folder. Left out: the Python documentation of this machine.
        length: tokens of each text, e.g. 32K or 128K. Left out: the model's window.
        texts: how many texts of that length, spread evenly over what is there.
        window: read each text in overlapping windows of so many tokens, each token with a quarter of one to a whole one
            before it. With --before and the window of the model before: what that model can do on the same text. Left
            out: each text whole.
        buckets: stretches of positions that the loss is averaged in.
        where: column=value, rows to take.
        join: lay all texts together as one ring, and begin at evenly spaced places of it: where --texts of them cover
            it more than once, each place is read at several positions, so that positions differ by the model and not by
            what stands there. Left out: shorter texts are left out.
        language: of the built-in text.
        sp: ranks that share one text.
        kernel: attention kernel by name, or auto.
        before: evaluate the model that the run MODEL started from.
        base: the base model of an adapter, where it has moved.
        out: folder of the results. Left out: RUN/eval, or eval/<model>.
        name: of the result. Left out: perplexity.
        json: print one JSON object instead of a table.
    """
    if sp < 1 or buckets < 1 or texts < 1:
        raise ConfigError(f"--sp {sp}, --buckets {buckets}, --texts {texts}: each should be 1 or more")
    if length is not None and tokens_of("--length", length) < 2:
        raise ConfigError(f"--length is {length}: a text of one token has none to predict, give 2 or more")
    if window is not None and tokens_of("--window", window) < 8:
        raise ConfigError(f"--window is {window}: expected 8 or more tokens, e.g. 8K")
    arguments = {key: value for key, value in locals().items() if value is not None and value is not False}
    if start_ranks("perplexity", "--sp", sp, arguments):
        return
    launch = Launch.from_environment()
    if launch.world % sp:
        raise ConfigError(f"--sp is {sp}, which does not divide the {launch.world} ranks of this launch")
    with said_once(launch.rank):
        counts = {
            flag: given and tokens_of(f"--{flag}", given) for flag, given in (("length", length), ("window", window))
        }
        result = _measure(launch, **{**arguments, **counts})
    if launch.rank == 0:
        _show(result, json)


def _measure(
    launch: Launch,
    *,
    model: str,
    texts: int,
    buckets: int,
    sp: int,
    kernel: str,
    language: Language,
    text: str | None = None,
    length: int | None = None,
    window: int | None = None,
    where: str | None = None,
    join: bool = False,
    before: bool = False,
    base: str | None = None,
    out: str | None = None,
    name: str | None = None,
    json: bool = False,
) -> dict[str, Any]:
    """All ranks call it alike; rank 0 writes and returns the result, the others {}."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.local_world)))
    import torch.distributed as dist

    from ds_longft.layout import ParallelLayout
    from ds_longft.ranks.join import join as join_ranks
    from ds_longft.sequence.attention import ULYSSES, register
    from ds_longft.sequence.state.families import spread_state_layers
    from ds_longft.tools.evaluate import results
    from ds_longft.tools.evaluate.position_loss import bucket_losses, read_in_windows
    from ds_longft.tools.evaluate.subject import find_subject, load_subject, subject_tokenizer

    subject = find_subject(model, before=before, base=base)
    device, agreement = join_ranks(launch)
    layout = ParallelLayout.create(sp)
    register()
    tokenizer = subject_tokenizer(subject)
    loaded = load_subject(subject, device, attention=ULYSSES)
    spread_state_layers(loaded.plain)
    tokens = length or loaded.window or 8192
    source = read_texts(text, language, where=where, characters=CHARACTERS_A_TOKEN * tokens * texts)
    pieces = pieces_of(tokenizer, source, tokens, texts, join=join or text is None)
    settings = {
        "weights": results.weights_identity(subject),
        "text": text or f"built in, {language}",
        "where": where,
        "join": join,
        "length_tokens": tokens,
        "window_tokens": window,
        "texts": len(pieces),
        "texts_fingerprint": results.fingerprint(pieces),
        "buckets": buckets,
    }
    folder, file = results.result_folder(subject, out), results.result_name(name, "perplexity", before)
    opened: list[results.Rows] = []  # on rank 0

    def open_rows() -> set[str]:
        opened.append(results.Rows(folder, file, settings, total=len(pieces)))
        return {row["key"] for row in opened[0].rows}

    def losses(ids: list[int]) -> NDArray[np.float64]:
        return bucket_losses(loaded, read_in_windows(ids, window or len(ids), sp), layout, kernel, buckets)

    done = agreement.on_rank0(open_rows)
    todo = [i for i in range(len(pieces)) if str(i) not in done]
    for first in range(0, len(todo), layout.dp):
        mine = todo[first : first + layout.dp][layout.dp_rank : layout.dp_rank + 1]
        # Every rank of an sp group has the same text; a group without one left waits for the others.
        gathered = agreement.gather((mine[0], losses(pieces[mine[0]])) if mine else None)
        for rows in opened:
            _add_rows(rows, gathered)
    result = {}
    for rows in opened:
        result = rows.finish("perplexity", subject.shown, summarize(rows.rows, tokens, buckets))
    agreement.gather(None)  # whoever leaves first could end the others
    dist.destroy_process_group()
    return result


def _add_rows(rows: Any, gathered: Sequence[tuple[int, NDArray[np.float64]] | None]) -> None:
    """Sums and counts of the shards of each text, added up and appended as a row."""
    sums: dict[int, NDArray[np.float64]] = {}
    for one in gathered:
        if one is not None:
            sums[one[0]] = sums.get(one[0], 0) + one[1]
    for index, (losses, counts) in sorted(sums.items()):
        rows.add({"key": str(index), "loss_sums": losses.tolist(), "targets": counts.astype(int).tolist()})


def pieces_of(tokenizer: Any, texts: list[str], tokens: int, count: int, *, join: bool) -> list[list[int]]:
    """Pieces of exactly `tokens` tokens, spread evenly over the texts.

    With `join`, `count` of them from evenly spaced places of all texts laid to a ring, which may overlap; without, at
    most `count` that do not.

    Raises:
        DataError: no text is that long.
    """
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    body = tokens - len(bos)
    streams = [token_stream(tokenizer, texts)] if join else [encode(tokenizer, text) for text in texts]
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
    """Mean loss (nats a token) of each bucket, of the eighths, of doubling ranges, and of everything."""
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


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json_text.dumps(result, ensure_ascii=False))
        return
    tokens = result["length_tokens"]
    table = Table("positions", "loss", "perplexity", title=f"{result['texts']} texts of {tokens:,} tokens")
    for i, value in enumerate(result["loss_by_eighth"]):
        if value is not None:
            first, last = i * tokens // SHOWN_PARTS, (i + 1) * tokens // SHOWN_PARTS
            table.add_row(f"{first:,} - {last:,}", f"{value:.4f}", f"{math.exp(value):.2f}")
    table.add_section()
    table.add_row("all", f"{result['loss']:.4f}", f"{result['perplexity']:.2f}", style="bold")
    Console().print(table)
    sys.stdout.flush()
