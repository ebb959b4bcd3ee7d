"""Endings of the files that rows are read from."""

from __future__ import annotations

from pathlib import Path

LINES = (".json", ".jsonl", ".jsonlines", ".ndjson")
TABLES = (".parquet", ".arrow", ".feather")
SUFFIXES = (*LINES, *TABLES, ".csv", ".tsv", ".txt", ".tar", ".tgz")
PACKED = (".gz", ".bz2", ".lz4", ".zst")
EXPECTED = f"{', '.join(SUFFIXES)} ({', '.join(PACKED)} too)"
UNREAD = {".xz", ".zip", ".7z", ".rar", ".xlsx", ".pkl"}  # data too, in a form not read here


def suffix_of(path: Path) -> str:
    """The ending that says what a file holds, without the one that says how it is packed."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in PACKED:
        return suffixes[-2] if len(suffixes) > 1 else ""
    return suffixes[-1] if suffixes else ""


def not_read(path: Path) -> str:
    """Why a file of this name is not read, "" if it is."""
    suffix = suffix_of(path)
    if suffix in SUFFIXES:
        return ""
    return f"expected {EXPECTED}; convert it"
