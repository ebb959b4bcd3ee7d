"""Which rows of a set are taken, by the values of their columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_longft.errors import ConfigError


@dataclass(frozen=True)
class Where:
    """Takes rows that have every value of `where` and none of `exclude` (column -> value, compared as text), and in the
    columns of `least` a number as large.
    """

    where: Mapping[str, str] = field(default_factory=dict)
    exclude: Mapping[str, str] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)

    def takes(self, record: Mapping[str, Any]) -> bool:
        """Whether a row is taken. A column that a row does not have is equal to nothing."""
        return (
            all(_is(record, *pair) for pair in self.where.items())
            and not any(_is(record, *pair) for pair in self.exclude.items())
            and all(number_of(record, column) >= least for column, least in self.least.items())
        )

    def __str__(self) -> str:
        given = (("where", self.where), ("exclude", self.exclude), ("least", self.least))
        parts = [(name, pairs) for name, pairs in given if pairs]
        return " and ".join(f"{name} " + ", ".join(f"{k}={v}" for k, v in pairs.items()) for name, pairs in parts)


EVERY_ROW = Where()


def parse_where(flag: str, given: str | None) -> dict[str, str]:
    """`column=value` of a command line flag. Raises ConfigError."""
    if given is None:
        return {}
    column, _, value = given.partition("=")
    if not (column and value):
        raise ConfigError(f"{flag} is {given!r}, expected column=value, e.g. lang=en")
    return {column: value}


def number_of(record: Mapping[str, Any], column: str) -> float:
    """The number in a column; where there is none, one that is smaller than all."""
    value = record.get(column)
    return float(value) if isinstance(value, int | float) else float("-inf")


def _is(record: Mapping[str, Any], column: str, value: str) -> bool:
    return column in record and str(record[column]) == value
