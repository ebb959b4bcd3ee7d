"""LongPPL: perplexity over the tokens that what stands far before them helps to predict (arXiv 2410.23771).

An evaluator reads each text whole, and with a short context alone. Its key tokens are those that the short context
costs more than `GAIN` nats, and that it predicts well from the whole text. Any model's perplexity over them is its
LongPPL: numbers of one evaluator compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds_longft.errors import ConfigError
from ds_longft.run_files import EvaluationRow
from ds_longft.stored import read_lines

GAIN, MOST = 2.0, 2.0  # nats, as published: what the far context gains at least, the loss with it at most
STEP = 4  # a window predicts a fourth of the short context behind it: 1,024 tokens with 4,096 published


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
