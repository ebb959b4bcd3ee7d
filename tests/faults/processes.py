"""Processes of a run, as the machine sees them."""

from __future__ import annotations

import os
from pathlib import Path


def tree(output: Path) -> dict[int, str]:
    """Living processes whose command line names the output folder: pid -> command."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            continue
        if entry.name.isdecimal() and str(output) in command and state != "Z" and int(entry.name) != os.getpid():
            found[int(entry.name)] = command
    return found
