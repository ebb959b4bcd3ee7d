"""The checkpoint search of a run of two ranks, played by one process: no communication, no model."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from ds_longft.errors import CheckpointError
from ds_longft.train.checkpoint import Checkpoints


class Alone:
    """An agreement of one."""

    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def find(folder: Path, resume: str | int) -> tuple[Path | None, str]:
    """(the checkpoint that would be continued, what was said about it)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            found = Checkpoints(folder, Alone(), keep=2).find(resume)  # type: ignore[arg-type]
        except CheckpointError as e:
            return None, said.getvalue() + str(e)
    return (found[0] if found else None), said.getvalue()
