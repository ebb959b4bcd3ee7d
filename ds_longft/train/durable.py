"""Files that a disk full for a minute does not cost anything: what cannot be written is kept, and tried again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 60.0  # at the end of a run, where nothing comes after
PAUSE_S = 1.0


class DurableLines:
    """Appends lines to a file; those that the disk does not take wait in memory for the next one."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.waiting: list[bytes] = []
        self._end = path.stat().st_size if path.exists() else 0  # of the last line that is whole
        self._said = False

    def write(self, line: str) -> None:
        """Append a line, and those before it that are still waiting."""
        self.waiting.append(line.encode() + b"\n")
        try:
            self.flush()
        except OSError as error:
            if not self._said:
                self._said = True
                self.say(f"{self.path.name} cannot be written ({error}): records are kept in memory until it can be")

    def flush(self) -> None:
        """Write what is waiting. Raises OSError; half a line that came of it is cut off by the next try."""
        data = b"".join(self.waiting)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            end = min(self._end, os.fstat(file).st_size)
            os.ftruncate(file, end)
            written = 0
            while written < len(data):
                written += os.pwrite(file, data[written:], end + written)
        finally:
            os.close(file)
        self._end = end + len(data)
        self.waiting.clear()
        if self._said:
            self._said = False
            self.say(f"{self.path.name} can be written again, and lacks nothing")


def as_readable_as_the_folder(folder: Path) -> None:
    """Weights as readable as what lies around them: safetensors 0.8 hides its files from everybody else."""
    for file in folder.glob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)


def insist(
    work: Callable[[], object], what: str, say: Callable[[str], None], *, patience_s: float = PATIENCE_S
) -> OSError | None:
    """Do work that writes a file, again until it succeeds or `patience_s` is over; then the last error is returned."""
    until = time.monotonic() + patience_s
    said = False
    while True:
        try:
            work()
        except OSError as error:
            if time.monotonic() >= until:
                say(f"{what} could not be written: {error}")
                return error
            if not said:
                said = True
                say(f"{what} cannot be written yet ({error}): trying again for {patience_s:.0f} s")
            time.sleep(PAUSE_S)
        else:
            return None
