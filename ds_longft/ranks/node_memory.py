"""How much memory this machine, or this container, has."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def node_memory_gib() -> float:
    """GiB: what is built in, or less where the container may not use all of it. Nodes of a run are alike."""
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in LIMITS:
        with suppress(OSError, ValueError):
            least = min(least, int(Path(file).read_text()))
    return least / 2**30
