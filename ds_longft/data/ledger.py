"""The ledger of rows that were left out: one JSON object a line with origin and reason, and the rule when to stop."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from ds_longft.errors import DataError

Kind = Literal["bad", "overlong", "set_aside"]


@dataclass(frozen=True)
class Entry:
    """One row that was left out. Only `bad` ones are faults: `overlong` and `set_aside` rows were dropped because the
    config says so.
    """

    origin: str
    reason: str
    detail: str = ""
    kind: Kind = "bad"


@dataclass
class Tally:
    """Counts over all rows that were read; kept with the tokenized set."""

    read: int = 0
    usable: int = 0
    truncated: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # reason -> rows
    overlong: int = 0
    set_aside: dict[str, int] = field(default_factory=dict)  # reason -> rows

    @property
    def bad_rows(self) -> int:
        """Rows with a fault."""
        return sum(self.bad.values())

    def check(self, max_bad_fraction: float, ledger: Path) -> None:
        """Raise `DataError` when no row is usable, or more than `max_bad_fraction` of the rows are bad."""
        reasons = "".join(f"\n  - {count} x {reason}" for reason, count in Counter(self.bad).most_common(5))
        if self.overlong:
            reasons += f"\n  - {self.overlong} x longer than data.max_length_tokens (left out by data.overlong)"
        if self.usable == 0:
            raise DataError(
                f"none of the {self.read} rows of data.train (or data.eval) can be trained on; each is listed in "
                f"{ledger}{reasons}"
            )
        if self.bad_rows > max_bad_fraction * self.read:
            raise DataError(
                f"{self.bad_rows} of {self.read} rows ({self.bad_rows / self.read:.1%}) are unusable, more than "
                f"data.max_bad_fraction allows ({max_bad_fraction:.1%}); each is listed in {ledger}{reasons}\n"
                "Mend the rows, or raise data.max_bad_fraction"
            )


class Ledger:
    """Writes entries as JSON lines to `path` and keeps the tally. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.tally = Tally()
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add(self, entry: Entry) -> None:
        """Count one row that was left out and write it down."""
        if entry.kind == "overlong":
            self.tally.overlong += 1
        else:
            counts = self.tally.bad if entry.kind == "bad" else self.tally.set_aside
            counts[entry.reason] = counts.get(entry.reason, 0) + 1
        self._file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
