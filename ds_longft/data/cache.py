"""A tokenized set on disk: parts of rows, each sealed with its number of rows, size and hash, and one tally.

Scratch file systems are purged file by file, copies stop half way, disks lose bits. A set is
whole by its seals or it is made again: nobody trains on what is left of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ds_longft.data.ledger import Tally
from ds_longft.stored import Unreadable, read_file

TALLY = "tally.json"
LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class PartSeal:
    """One file of rows as it was when it was written."""

    file: str
    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, rows: int) -> PartSeal:
        """Seal a file that was just written, and force it to the disk: what has a seal is whole."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            return cls(path.name, rows, file.tell(), digest)

    def damage(self, folder: Path, *, every_byte: bool) -> str | None:
        """What is wrong with the file by now: its size, or with `every_byte` its content."""
        path = folder / self.file
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"{self.file} has {size} bytes instead of {self.bytes}"
            if every_byte:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                        return f"{self.file} is not what was written (sha256)"
        except OSError as error:
            return f"{self.file} cannot be read ({error.strerror or error})"
        return None


@dataclass(frozen=True)
class SealedSet:
    """tally.json: what was counted, and the parts in their order. While tokenising there is one for each part."""

    tally: Tally
    parts: list[PartSeal] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it whole or not at all; it is the last file of a part, and of a set."""
        new = path.with_suffix(".tmp")
        new.write_text(json.dumps(asdict(self)))
        new.rename(path)


def sealed_set(folder: Path, *, every_byte: bool) -> SealedSet:
    """The tally and the parts of a set. Raises Unreadable where any of it is missing or damaged: make it again."""
    found = read_file(folder / TALLY, SealedSet)
    if sum(part.rows for part in found.parts) != found.tally.usable:
        raise Unreadable(f"{TALLY} counts {found.tally.usable} rows, its parts have {sum(p.rows for p in found.parts)}")
    for part in found.parts:
        problem = part.damage(folder, every_byte=every_byte)
        if problem:
            raise Unreadable(problem)
    return found


def whole_parts(folder: Path) -> set[int]:
    """Numbers of the parts that an earlier call has finished; it may have been killed, so every byte is looked at."""
    whole = set()
    for path in folder.glob("tally-*.json"):
        try:
            (part,) = read_file(path, SealedSet).parts
        except (Unreadable, ValueError):
            continue
        number = path.stem.removeprefix("tally-")
        if part.file == part_file(number) and part.damage(folder, every_byte=True) is None:
            whole.add(int(number))
    return whole


def part_file(number: int | str) -> str:
    """Name of a part's rows."""
    return f"rows-{number:05d}.arrow" if isinstance(number, int) else f"rows-{number}.arrow"


def close_set(folder: Path) -> None:
    """One tally and one ledger out of those of the parts. These go last: what ends in between can be done again."""
    sets = [read_file(file, SealedSet) for file in sorted(folder.glob("tally-*.json"))]
    with (folder / LEDGER).open("wb") as ledger:
        for file in sorted(folder.glob("ledger-*.jsonl")):
            with file.open("rb") as part:
                shutil.copyfileobj(part, ledger)
    SealedSet(sum((s.tally for s in sets), Tally()), [part for s in sets for part in s.parts]).write(folder / TALLY)
    for name in ("tally-*.json", "ledger-*.jsonl"):  # in this order: a part with a tally has a ledger
        for file in folder.glob(name):
            file.unlink()
