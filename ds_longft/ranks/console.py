"""What a process speaks to, and how: a console that may go away, in an encoding that others' files can be read in."""

from __future__ import annotations

import errno
import locale
import logging
import os
import sys
import warnings
from typing import Any, TextIO

NOBODY_THERE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class LastingStream:
    """A text stream that goes nowhere once nobody is at its other end, instead of raising."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or drop what nobody can read."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what nobody can read."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """On a full disk this line alone; where nobody listens any more, all that follow."""
        if error.errno not in NOBODY_THERE:
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # for C code that writes there too
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_the_console() -> None:
    """Put both streams of this process behind a `LastingStream`."""
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), LastingStream):
            setattr(sys, name, LastingStream(getattr(sys, name)))


SPOKEN_TO_THEIR_DEVELOPERS = (
    "Argument aux_data .* cannot be converted to a JitArgument",  # flash-attn-4: 700 characters a kernel
    r"barrier\(\): using the device under current context",  # torch, of the device that we have set
)


def quiet_libraries() -> None:
    """Silence what libraries say in every run and no user can act on.

    bitsandbytes 0.50 asks every process on a CPU for a kernel of a product that nothing here computes; liger tells
    which of its kernels for other makers' GPUs cannot be imported.
    """
    for name in ("bitsandbytes.backends.cpu", "liger_kernel.backends.registry"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in SPOKEN_TO_THEIR_DEVELOPERS:
        warnings.filterwarnings("ignore", message)


def speak_utf8() -> None:
    """Begin this program again in Python's UTF-8 mode where the locale has another encoding (zh_CN.GBK, plain ASCII).

    Libraries read their own source and files in the locale's encoding, and torch 2.13 fails at it. Ranks keep their
    process id.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
