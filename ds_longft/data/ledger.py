"""The ledger of rows that were left out: one JSON object a line with origin and reason, and the rule when to stop."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ds_longft.data.rows import BadRow, Kind
from ds_longft.errors import DataError

KEYS: dict[Kind, str] = {"repeated": "repeated id", "overlong": "too long"}  # one reason each, in counts
SHOWN_CHARS = 200  # of what was seen in the first row of a reason
DETAIL_CHARS = 1000


@dataclass(frozen=True)
class Entry:
    """One row that was left out."""

    origin: str
    reason: str
    detail: str = ""
    kind: Kind = "bad"

    @classmethod
    def of(cls, origin: str, bad: BadRow) -> Entry:
        """A row that cannot be used; of what was seen in it a long text is cut."""
        return cls(origin, bad.reason, bad.detail[:DETAIL_CHARS], bad.kind)


@dataclass
class Tally:
    """Counts over all rows that were read; kept with the tokenized set."""

    read: int = 0
    usable: int = 0
    truncated: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # reason -> rows
    overlong: int = 0
    set_aside: dict[str, int] = field(default_factory=dict)  # reason -> rows
    repeated: int = 0  # rows with the id of an earlier row
    first: dict[str, str] = field(default_factory=dict)  # reason of `left_out` -> the first such row, what was seen
    unused: dict[str, int] = field(default_factory=dict)  # what usable rows hold and nothing was made of -> rows
    too_long: list[tuple[int, int]] = field(default_factory=list)  # (tokens, targets) of rows above the limit

    def __add__(self, other: Tally) -> Tally:
        """Both counted together; the rows of `other` come second."""
        both: dict[str, Any] = {}
        for name, mine in vars(self).items():
            theirs = getattr(other, name)
            if name == "first":
                both[name] = theirs | mine
            else:
                both[name] = dict(Counter(mine) + Counter(theirs)) if isinstance(mine, dict) else mine + theirs
        return Tally(**both)

    @property
    def bad_rows(self) -> int:
        """Rows with a fault."""
        return sum(self.bad.values())

    @property
    def unusable_rows(self) -> int:
        """Rows with a fault, or with the id of an earlier row: what `max_bad_fraction` limits."""
        return self.bad_rows + self.repeated

    @property
    def left_out(self) -> dict[str, int]:
        """Reason -> rows, whatever the kind."""
        kinds = {KEYS["repeated"]: self.repeated, KEYS["overlong"]: self.overlong}
        return {**self.bad, **self.set_aside, **{reason: count for reason, count in kinds.items() if count}}

    def unused_remark(self) -> str:
        """What was in the rows and is not trained on; nothing where all of it is."""
        if not self.unused:
            return ""
        parts = [
            f"{name} ({count:,} rows)" for name, count in sorted(self.unused.items(), key=lambda nc: (-nc[1], nc[0]))
        ]
        return f"not used, of {self.usable:,} rows: {', '.join(parts)}. docs/data.md lists what each layout reads"

    def reasons(self) -> str:
        """A line for each reason why rows were left out, the most frequent first, each with its first row."""
        lines = []
        for reason, count in Counter(self.left_out).most_common():
            words = "longer than data.max_length_tokens (see data.overlong)" if reason == KEYS["overlong"] else reason
            first = f", first {self.first[reason]}" if reason in self.first else ""  # older sets were kept without
            lines.append(f"\n  - {count:,} x {words}{first}")
        return "".join(lines)

    def check(self, max_bad_fraction: float, ledger: Path) -> None:
        """Raise `DataError` when no row is usable, or more than `max_bad_fraction` of the rows are bad."""
        if self.usable == 0:
            raise DataError(
                f"none of the {self.read} rows of data.train (or data.eval) can be trained on; each is listed in "
                f"{ledger}{self.reasons()}"
            )
        unusable = self.unusable_rows
        if unusable > max_bad_fraction * self.read:
            ids = ", rename a column `id` that names no row alone" if self.repeated else ""
            raise DataError(
                f"{unusable} of {self.read} rows ({unusable / self.read:.1%}) are unusable, more than "
                f"data.max_bad_fraction allows ({max_bad_fraction:.1%}); each is listed in {ledger}{self.reasons()}\n"
                f"Mend the rows{ids}, or raise data.max_bad_fraction"
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
        tally = self.tally
        if entry.kind == "overlong":
            tally.overlong += 1
        elif entry.kind == "repeated":
            tally.repeated += 1
        else:
            counts = tally.bad if entry.kind == "bad" else tally.set_aside
            counts[entry.reason] = counts.get(entry.reason, 0) + 1
        seen = f" ({' '.join(entry.detail.split())[:SHOWN_CHARS]})" if entry.detail else ""
        tally.first.setdefault(KEYS.get(entry.kind, entry.reason), entry.origin + seen)
        self._file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
