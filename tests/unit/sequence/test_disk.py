"""Kept tensors in files: the same bits back, in any order that a pass asks for them, and errors that a user can read."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ds_longft.errors import DiskError
from ds_longft.sequence import disk
from ds_longft.sequence.disk import DiskStore
from ds_longft.sequence.kept import LEAVING, HostStore
from ds_longft.sequence.recompute import LayerKeep, apply_recompute

CPU = torch.device("cpu")
SHAPES = ([(1, 7, 33)], [(3,), (1, 5000)], [(70_000,)])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one no whole block, and fewer buffers than chunks."""
    monkeypatch.setattr(disk, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(disk, "BUFFERS", 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shapes", SHAPES)
def test_what_is_read_is_what_was_written(tmp_path: Path, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    store = DiskStore(str(tmp_path), CPU)
    for seed in range(3):  # files are reused, by longer and shorter ones
        torch.manual_seed(seed)
        sent = [torch.randn(*shape[:-1], shape[-1] + seed % 2).to(dtype) for shape in shapes]
        found = [torch.empty_like(t) for t in sent]
        store.write("x", sent)
        store.wait(store.read("x", found))
        assert all(torch.equal(a, b) for a, b in zip(sent, found, strict=True))
    assert list(tmp_path.iterdir()) == [], "files have no names"


def there_and_back(folder: Path) -> list[torch.Tensor]:
    """What was written, read again, and no file left to be seen."""
    store, sent = DiskStore(str(folder), CPU), [torch.randn(50_000)]
    found = [torch.empty_like(sent[0])]
    store.write("x", sent)
    store.wait(store.read("x", found))
    assert torch.equal(found[0], sent[0])
    assert list(folder.iterdir()) == []
    return sent


def test_folders_that_know_no_files_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse(path: str, flags: int, *args: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return opened(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    there_and_back(tmp_path)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EIO, "Input/output error")],
)
def test_a_write_that_fails_is_seen_before_its_tensor_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    host = HostStore(CPU, DiskStore(str(tmp_path), CPU))
    for layer in range(LEAVING):
        host.slot(layer, "input", disk=True).put(torch.zeros(9))
    with pytest.raises(DiskError, match=f"train.offload_disk: {tmp_path}.*{says}"):
        host.slot(LEAVING, "input", disk=True).put(torch.zeros(9))


def test_a_folder_without_direct_io_goes_through_the_page_cache_and_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, advise, done = os.open, os.posix_fadvise, []

    def refuse(path: str, flags: int, *args: Any) -> int:
        fd = opened(path, flags & ~os.O_DIRECT, *args)  # made before it is refused, as Linux does
        if flags & os.O_DIRECT:
            os.close(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return fd

    def advised(fd: int, at: int, size: int, what: int) -> None:
        done.append((at, size, what))
        advise(fd, at, size, what)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "posix_fadvise", advised)
    assert not disk.is_direct(str(tmp_path))
    sent = there_and_back(tmp_path)
    chunks = [(at, part.numel(), os.POSIX_FADV_DONTNEED) for at, part in disk._chunks(sent)]
    assert sorted(done) == sorted(chunks * 2)


def test_direct_writes_that_are_refused_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    assert disk.is_direct(str(tmp_path))
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(DiskError, match="direct reads and writes, and refuses them"):
        DiskStore(str(tmp_path), CPU).rates(1 << 16)


@pytest.mark.parametrize(("kind", "memory"), [("tmpfs", True), ("ramfs", True), ("ext4", False), ("overlay", False)])
def test_a_folder_in_memory_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, memory: bool) -> None:
    mounts = f"x / ext4 rw 0 0\nx {tmp_path.parent} {kind} rw 0 0\nx {tmp_path}/deeper tmpfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _: mounts)
    assert disk.is_memory(str(tmp_path)) == memory


def test_rates_leave_nothing_behind(tmp_path: Path) -> None:
    store = DiskStore(str(tmp_path), CPU)
    assert min(store.rates(1 << 20)) > 0
    assert store._files == {}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


PLACES = (["device"] * 6, ["host"] * 6, ["disk"] * 6, ["disk", "host", "device"] * 2)


def gradients(places: list[Any], policy: str, folder: Path, device: torch.device) -> list[torch.Tensor]:
    """Of three passes, the second without a backward pass."""
    torch.manual_seed(0)
    layers = [Layer().to(device) for _ in range(6)]
    store = HostStore(device, DiskStore(str(folder), device))
    apply_recompute(layers, policy, keep=[LayerKeep(i, store=store, input=place) for i, place in enumerate(places)])
    x = torch.randn(1, 300, 64, device=device, requires_grad=True)
    for backward in (True, False, True):
        out = x
        for layer in layers:
            out = layer(out)
        if backward:
            out.square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for layer in layers for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("policy", ["full", "every_k", "sqrt"])
def test_gradients_are_bit_equal_wherever_inputs_wait(tmp_path: Path, policy: str) -> None:
    expected, *others = (gradients(places, policy, tmp_path, CPU) for places in PLACES)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


def test_what_is_asked_for_while_it_leaves_is_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, read_from = list[Any](), DiskStore.read

    def noted(store: DiskStore, key: Any, tensors: Any) -> Any:
        read.append(key)
        return read_from(store, key, tensors)

    monkeypatch.setattr(DiskStore, "read", noted)
    of_device, of_disk = (gradients([place] * 6, "full", tmp_path, CPU) for place in ("device", "disk"))
    assert read == [(layer, "input") for layer in (3, 2, 1, 0)] * 2
    assert all(torch.equal(a, b) for a, b in zip(of_device, of_disk, strict=True))
