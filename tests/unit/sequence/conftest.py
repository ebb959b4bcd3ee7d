"""A CUDA runtime that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Memory that is pinned, start -> bytes. As CUDA does, it refuses what overlaps, and forgets nothing by itself."""
    pinned: dict[int, int] = {}

    def is_mapped(start: int) -> bool:
        spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(first, 16) <= start < int(end, 16) for first, end in spans)

    class Runtime:
        @staticmethod
        def cudaHostRegister(start: int, size: int, flags: int) -> None:
            assert size > 0, "cudaErrorInvalidValue"
            assert not any(s < start + size and start < s + n for s, n in pinned.items()), "HostMemoryAlreadyRegistered"
            pinned[start] = size

        @staticmethod
        def cudaHostUnregister(start: int) -> None:
            assert is_mapped(start)
            del pinned[start]

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)  # there is none in a build for CPUs
    return pinned
