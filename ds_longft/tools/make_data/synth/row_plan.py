"""What makers of rows are asked for, and how long, and in which language, each row is: shares kept to the row."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeVar

from ds_longft.errors import ConfigError
from ds_longft.tools.make_data.lengths import Lengths

K = TypeVar("K")
Messages = list[dict[str, str]]

# Parts of the longest row and their shares. A long row holds as many tokens as many short ones, so that nearly
# half of all tokens lie in rows of full length all the same, while most steps of a run see several lengths.
SIZES: Mapping[str, float] = {"1/32": 3, "1/16": 3, "1/8": 3, "1/4": 3, "1/2": 2, "1": 2}
SHORTEST_TOKENS = 512  # less holds no text beside a few questions


@dataclass(frozen=True)
class Wanted:
    """What every maker of rows is asked for. The same seed gives the same rows."""

    rows: int
    context_tokens: int  # of the longest row, chat template included
    seed: int
    name: str  # `source` of the rows
    lengths: Lengths = field(default_factory=Lengths)  # how tokens are counted; estimated when left out

    def identity(self, number: int | str, language: str) -> dict[str, str]:
        """What a row says of itself."""
        return {"source": self.name, "language": language, "id": f"{self.name}-{self.seed}-{number}"}


def in_turns(text: str, asked: Iterable[tuple[str, str]]) -> Messages:
    """Questions and their answers, one after the other; the text that they are about in front of the first."""
    messages: Messages = []
    for question, answer in asked:
        content = question if messages else f"{text}{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def plan_rows(
    rows: int,
    amounts: Mapping[str, int],
    longest_tokens: int,
    rng: random.Random,
    *,
    languages: Mapping[str, float] | None = None,
    sizes: Mapping[str, float] | None = None,
) -> list[tuple[str, int]]:
    """(language, tokens) of each row, in random order.

    Args:
        rows: how many.
        amounts: language -> amount of text there is, in any unit.
        longest_tokens: of the longest row.
        rng: shuffles.
        languages: wanted shares of the rows; languages not named share what these leave, by the amount of text.
        sizes: part of the longest row, a number or a fraction -> its share of the rows; the same in every language.

    Raises:
        ConfigError: a size is not a part between 0 and 1, or a share is not above 0.
    """
    parts = size_parts(sizes or SIZES)
    planned: list[tuple[str, int]] = []
    for language, count in apportion(rows, language_shares(amounts, languages or {})).items():
        for part, some in apportion(count, parts).items():
            tokens = max(round(part * longest_tokens), min(SHORTEST_TOKENS, longest_tokens))
            planned += [(language, tokens)] * some
    rng.shuffle(planned)
    return planned


def language_shares(amounts: Mapping[str, int], wanted: Mapping[str, float]) -> dict[str, float]:
    """Language -> share of the rows, for the languages that have text; a wanted one without text gets nothing."""
    named = {language: wanted[language] for language in amounts if language in wanted}
    others = {language: amount for language, amount in amounts.items() if language not in wanted}
    left = max(0.0, 1 - sum(named.values())) / max(1, sum(others.values()))
    shares = named | {language: left * amount for language, amount in others.items()}
    return shares if sum(shares.values()) > 0 else dict.fromkeys(amounts, 1.0)


def size_parts(sizes: Mapping[str, float]) -> dict[Fraction, float]:
    """`1/32` or `0.5` -> share, as numbers. Raises ConfigError."""
    parts: dict[Fraction, float] = {}
    for name, share in sizes.items():
        try:
            part = Fraction(str(name))
        except (ValueError, ZeroDivisionError):
            part = Fraction(0)
        if not 0 < part <= 1 or not share > 0:
            raise ConfigError(
                f"sizes: seen {name}: {share}, expected parts of the longest row between 0 and 1 and shares above 0, "
                "e.g. {1/4: 3, 1: 1}"
            )
        parts[part] = share
    return parts


def apportion(count: int, shares: Mapping[K, float]) -> dict[K, int]:
    """`count` things shared out in whole numbers: the largest remainders are rounded up (Hamilton's method)."""
    total = sum(shares.values())
    exact = {key: count * share / total for key, share in shares.items()}
    whole = {key: int(value) for key, value in exact.items()}
    by_remainder = sorted(exact, key=lambda key: whole[key] - exact[key])
    for key in by_remainder[: count - sum(whole.values())]:
        whole[key] += 1
    return whole
