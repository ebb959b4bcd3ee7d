"""Cutting a byte stream into raw records, with bounded memory whatever the stream holds.

Lines of JSONL, or the elements of one JSON array: in both the borders are found without parsing, so that a broken
record costs only itself. A record too large, and a packed file that unpacks to far more than data does, end in the
ledger.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from ds_longft.data.rows import BadRow

MAX_RECORD_BYTES = 64 << 20  # far above one sample: 1M tokens are about 5 MB
CHUNK_BYTES = 1 << 20
# JSON text packs 3 to 20 times, gzip's most is 1032 times. Judged late, so that a small odd file passes.
MAX_EXPANSION = 200
EXPANSION_JUDGED_BYTES = 1 << 30

Record = bytes | BadRow


class Bomb(Exception):
    """A packed file that unpacks to more than `MAX_EXPANSION` times its size."""


class Metered:
    """A stream that stops a zip bomb: reads as `stream` does, and raises `Bomb` when the file grows out of all measure.

    `packed_bytes` is the size of the file on disk, None for a file that is not packed.
    """

    def __init__(self, stream: IO[bytes], packed_bytes: int | None) -> None:
        self._stream = stream
        self._limit = max(EXPANSION_JUDGED_BYTES, MAX_EXPANSION * packed_bytes) if packed_bytes is not None else None
        self._read_bytes = 0

    def _count(self, data: bytes) -> bytes:
        self._read_bytes += len(data)
        if self._limit is not None and self._read_bytes > self._limit:
            raise Bomb
        return data

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        return self._count(self._stream.read(size))

    def first_byte(self) -> bytes:
        """The first byte that is no blank, as far as it can be seen without reading."""
        return self._stream.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]  # type: ignore[attr-defined]

    def readline(self, size: int) -> bytes:
        """Up to the next line end, at most `size` bytes."""
        return self._count(self._stream.readline(size))


def lines(stream: Metered) -> Iterator[Record]:
    """Each line; one longer than `MAX_RECORD_BYTES` is skipped and comes as a `BadRow`."""
    while line := stream.readline(MAX_RECORD_BYTES):
        if len(line) == MAX_RECORD_BYTES and not line.endswith(b"\n"):
            size = len(line)
            del line
            while rest := stream.readline(CHUNK_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield too_large(size)
        else:
            yield line


def too_large(size_bytes: int) -> BadRow:
    """What is said about a record above `MAX_RECORD_BYTES`."""
    return BadRow("record too large", f"{size_bytes >> 20} MiB, the limit is {MAX_RECORD_BYTES >> 20}")


_OUTSIDE = re.compile(rb'["\[\]{},]')  # outside of strings only these matter for where an element ends
_INSIDE = re.compile(rb'["\\]')


def array_elements(stream: Metered) -> Iterator[Record]:
    """Each element of the JSON array that the stream holds, as raw bytes.

    Strings and brackets are followed, nothing else is understood: an element with broken JSON inside is cut out at its
    own borders. An array without its end comes with a `BadRow` last.
    """
    depth, in_string, escaped, size = 0, False, False, 0
    parts: list[bytes] = []

    def element() -> Record | None:
        content = b"".join(parts).strip() if size <= MAX_RECORD_BYTES else b""
        if size > MAX_RECORD_BYTES:
            return too_large(size)
        return content or None

    while chunk := stream.read(CHUNK_BYTES):
        at, start = int(escaped), 0
        escaped = False
        while found := (_INSIDE if in_string else _OUTSIDE).search(chunk, at):
            at = found.end()
            mark = found.group()
            if mark == b'"':
                in_string = not in_string
            elif mark == b"\\":
                at, escaped = at + 1, at == len(chunk)
            elif mark in b"[{":
                depth += 1
                if depth == 1:
                    start = at  # behind the bracket that opens the array
            elif mark in b"]}" or depth == 1:
                depth -= mark in b"]}"
                if (mark == b"," and depth == 1) or depth == 0:
                    parts.append(chunk[start : at - 1])
                    size += at - 1 - start
                    if (record := element()) is not None:
                        yield record
                    parts, size, start = [], 0, at
                    if depth == 0:
                        if (chunk[at:] + stream.read(CHUNK_BYTES)).strip():
                            yield BadRow("text behind the end of the JSON array")
                        return
        size += len(chunk) - start
        if size <= MAX_RECORD_BYTES:
            parts.append(chunk[start:])
        else:
            parts = []
    yield BadRow("JSON array without its end", f"{size} bytes of an unfinished element")
