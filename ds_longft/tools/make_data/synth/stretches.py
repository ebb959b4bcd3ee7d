"""Stretches of running text in wanted lengths: documents laid one behind the other, cut anywhere, filled to the token.

Plain text of all lengths up to the window is what a stretched window is trained on; the documents themselves may be
much shorter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ds_longft.errors import DataError
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.row_plan import Wanted, plan_rows
from ds_longft.tools.make_data.synth.sources import Document

T = TypeVar("T")

BETWEEN = "\n\n"  # two documents; attention reaches over it
LINE_CHARS = 400  # a stretch begins with a line where one begins so near
FIT_ROUNDS = 8  # cutting changes a few tokens at the cut: the first round is exact or off by a handful


@dataclass(frozen=True)
class RunningText:
    """Documents of one language as one text."""

    text: str
    starts: NDArray[np.int64]  # [tokens] character at which each token begins

    @property
    def tokens(self) -> int:
        """How long it is."""
        return len(self.starts)

    def place(self, tokens: int, rng: random.Random) -> int:
        """The character at which a stretch of `tokens` may begin: anywhere, at a line's beginning if one is near.

        Raises:
            DataError: the text is shorter.
        """
        if tokens > self.tokens:
            raise DataError(
                f"the texts of one language hold {self.tokens:,} tokens together, a stretch of {tokens:,} was wanted: "
                "give more text, or a lower context_tokens"
            )
        last = int(self.starts[self.tokens - tokens])
        at = int(self.starts[rng.randrange(self.tokens - tokens + 1)])
        line = self.text.find("\n", at, at + LINE_CHARS) + 1
        return line if 0 < line <= last else at

    def cut(self, start: int, tokens: int) -> str:
        """The text of about `tokens` tokens from a character on."""
        end = int(np.searchsorted(self.starts, start)) + tokens
        return self.text[start : int(self.starts[end]) if end < self.tokens else None]


def running_texts(documents: Sequence[Document], lengths: Lengths, separator: str = BETWEEN) -> dict[str, RunningText]:
    """Language -> its documents, in their order, one behind the other. Memory: 8 bytes a token beside the text."""
    texts: dict[str, list[str]] = {}
    for document in documents:
        texts.setdefault(document.language, []).append(document.text + separator)
    running = {}
    for language, parts in sorted(texts.items()):
        before = np.cumsum([0, *map(len, parts)])
        starts = [lengths.starts(part) + at for part, at in zip(parts, before, strict=False)]
        running[language] = RunningText("".join(parts), np.concatenate(starts))
    return running


def stretch_rows(
    documents: Sequence[Document],
    wanted: Wanted,
    *,
    languages: Mapping[str, float] | None = None,
    sizes: Mapping[str, float] | None = None,
    separator: str = BETWEEN,
) -> Iterator[dict[str, Any]]:
    """Rows in `text` form. Two stretches may overlap.

    Args:
        documents: what is cut; a stretch goes on in the next document of its language.
        wanted: how many rows, and how long.
        languages: shares of the rows, by language code; left out, as there is text.
        sizes: part of the longest row -> share of the rows, e.g. {"1/4": 3, "1": 1}; left out, `row_plan.SIZES`.
        separator: between two documents.

    Raises:
        DataError: there is less text in a language than its longest row has tokens.
    """
    running = running_texts(documents, wanted.lengths, separator)
    rng = random.Random(f"stretches {wanted.seed}")
    amounts = {language: text.tokens for language, text in running.items()}
    planned = plan_rows(wanted.rows, amounts, wanted.context_tokens, rng, languages=languages, sizes=sizes)
    for number, (language, tokens) in enumerate(planned):
        start = running[language].place(tokens, rng)
        made = fill(partial(running[language].cut, start), wanted.lengths.plain, tokens)
        yield {"text": made, **wanted.identity(number, language)}


def fill(make: Callable[[int], T], measure: Callable[[T], int], tokens: int, room: int | None = None) -> T:
    """What `make` makes of the most text such that `measure` finds `tokens` at most.

    `room`: tokens of text to begin with; `tokens` when left out. Raises DataError where no text fits.
    """
    room = tokens if room is None else room
    for _ in range(FIT_ROUNDS):
        if room < 1:
            break
        made = make(room)
        over = measure(made) - tokens
        if over <= 0:
            return made
        room -= over
    raise DataError(f"rows of {tokens:,} tokens leave no room for text: give a larger context_tokens")
