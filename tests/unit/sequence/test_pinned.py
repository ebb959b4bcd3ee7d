"""Pinned memory: all of it, for as long as it is there, and no longer."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from ds_longft.sequence.disk import BUFFERS, DiskStore
from ds_longft.sequence.kept import HostStore
from ds_longft.sequence.pinned import Pages, pinned


@pytest.mark.parametrize("size", [1, 5000, 1 << 20])
def test_it_is_pinned_whole_and_freed_unpinned(registered: dict[int, int], size: int) -> None:
    memory = pinned(size)
    assert memory.numel() == size
    assert registered == {memory.data_ptr(): size}
    view = memory[:1].view(torch.int8)
    del memory
    assert registered
    del view
    assert not registered


def test_stores_that_are_dropped_leave_nothing_pinned(registered: dict[int, int], tmp_path: Path) -> None:
    """Where memory stayed pinned when it was freed, the next store was refused what came to lie there."""
    gpu = torch.device("cuda")
    for _ in range(20):
        store = HostStore(torch.device("cpu"))
        store.device = gpu
        for name in range(4):
            store.buffer(name, torch.ones(64, 8))
    assert len(registered) == 4
    del store
    assert not registered
    disk = DiskStore(str(tmp_path), torch.device("cpu"))
    disk.device = gpu
    disk.wait(disk.write("x", [torch.ones(1000)]))
    assert len(registered) == BUFFERS
    disk.close()
    gc.collect()
    assert not registered


def test_pages_that_were_never_pinned(registered: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    memory = Pages.of(10).tensor()
    memory.fill_(3)
    assert memory.tolist() == [3] * 10
    del memory
    assert not raised
    assert not registered
