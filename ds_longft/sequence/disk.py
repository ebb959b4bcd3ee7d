"""Kept tensors in files: what neither GPU nor host memory holds.

A tensor goes through pinned buffers of `CHUNK_BYTES`: copied by the device, written by a thread; read by a thread,
copied back. Threads work on several chunks at a time, beside the compute. Reads and writes are direct: the page cache
would take the host memory that is not there. On file systems that have none (some of networks) each chunk is flushed
and dropped from the cache at once.

Files have no name (O_TMPFILE, or unlinked as soon as they are open): the kernel frees them when the process ends,
however it ends.
"""

from __future__ import annotations

import errno
import os
import queue
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_longft.errors import DiskError
from ds_longft.sequence.pinned import Pages

CHUNK_BYTES = 32 << 20
"""Of a buffer: large enough for an NVMe disk's full rate."""

THREADS = 8
"""Of each rank, each with one read or write under way."""

BUFFERS = 2 * THREADS
"""So many chunks are pinned: 0.5 GiB of each rank."""

ALIGNED = 4096  # direct reads and writes are of whole blocks


class DiskStore:
    """Files of one process in a folder, one for each name, reused between steps.

    Raises DiskError: from `wait`, where a read or write failed; at once, where no file can be made in the folder.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.folder = folder
        self.device = torch.empty(0, device=device).device  # with its index: threads of ours begin with GPU 0
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if gpu else None  # out and back
        self._files: dict[Hashable, Any] = {}
        self._newest: dict[Hashable, list[Future[None]]] = {}  # of each name, what must be over before the next
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._direct = True

    def write(self, key: Hashable, tensors: Sequence[Tensor]) -> list[Future[None]]:
        """Start writing contiguous tensors; they must live until `wait`."""
        self.wait(self._newest.get(key, ()))
        file, ready = self._file(key), self._ready()
        chunks = _chunks(tensors)
        self._newest[key] = [self._submit(self._write, file, at, part, ready) for at, part in chunks]
        return self._newest[key]

    def read(self, key: Hashable, tensors: Sequence[Tensor]) -> list[Future[None]]:
        """Start reading into contiguous tensors of the shapes that were written."""
        file, ready, written = self._file(key), self._ready(), self._newest[key]
        chunks = _chunks(tensors)
        self._newest[key] = [
            self._submit(self._read, file, at, part, ready, before)
            for (at, part), before in zip(chunks, written, strict=True)
        ]
        return self._newest[key]

    def call_off(self, key: Hashable) -> list[Future[None]]:
        """Write no more of it, and let nobody read it; what is under way."""
        self._newest[key] = [transfer for transfer in self._newest[key] if not transfer.cancel()]
        return self._newest[key]

    def wait(self, transfers: Sequence[Future[None]]) -> None:
        """Until they are over, on the host: only then device tensors may be freed or read."""
        for transfer in transfers:
            try:
                transfer.result()
            except OSError as error:
                raise DiskError(disk_words(self.folder, error)) from error

    def rates(self, size: int) -> tuple[float, float]:
        """Bytes a second, written and read, of `size` bytes there and back."""
        sample = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        self.wait(self.write("rate", [sample[:CHUNK_BYTES]]))  # threads, buffers and a file
        times = [time.monotonic()]
        for start in (self.write, self.read):
            self.wait(start("rate", [sample]))
            times.append(time.monotonic())
        del self._files["rate"], self._newest["rate"]
        return size / (times[1] - times[0]), size / (times[2] - times[1])

    def close(self) -> None:
        """End the threads and give the pinned memory back."""
        if self._threads is not None:
            self._threads.shutdown()
        while not self._buffers.empty():
            self._buffers.get()

    def _submit(self, work: Callable[..., None], *args: Any) -> Future[None]:
        if self._threads is None:
            for _ in range(BUFFERS):
                self._buffers.put(_Buffer(self.device))
            use_device = partial(torch.cuda.set_device, self.device) if self._streams else None
            self._threads = ThreadPoolExecutor(THREADS, "disk", use_device)
        return self._threads.submit(work, *args)

    def _file(self, key: Hashable) -> Any:
        if key not in self._files:
            try:
                self._files[key], self._direct = _open(self.folder)
            except OSError as error:
                raise DiskError(disk_words(self.folder, error)) from error
        return self._files[key]

    def _ready(self) -> Any:
        """What compute has been given so far: it makes what is written, and may use memory that is read into."""
        return torch.cuda.current_stream(self.device).record_event() if self._streams else None

    def _write(self, file: Any, at: int, part: Tensor, ready: Any) -> None:
        buffer = self._buffers.get()
        try:
            self._copy(part, buffer.memory[: part.numel()], ready, 0)
            _whole(os.pwrite, file.fileno(), buffer.view, part.numel(), at)
            self._drop(file, at, part)
        finally:
            self._buffers.put(buffer)

    def _read(self, file: Any, at: int, part: Tensor, ready: Any, written: Future[None]) -> None:
        written.result()  # it was given to the threads before
        buffer = self._buffers.get()
        try:
            _whole(lambda fd, view, at: os.preadv(fd, [view], at), file.fileno(), buffer.view, part.numel(), at)
            self._drop(file, at, part)
            self._copy(buffer.memory[: part.numel()], part, ready, 1)
        finally:
            self._buffers.put(buffer)

    def _drop(self, file: Any, at: int, part: Tensor) -> None:
        """Take a chunk out of the page cache, where it went through it."""
        if not self._direct:
            os.fdatasync(file.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(file.fileno(), at, part.numel(), os.POSIX_FADV_DONTNEED)

    def _copy(self, source: Tensor, target: Tensor, ready: Any, way: int) -> None:
        if self._streams is None:
            target.copy_(source)
            return
        stream = self._streams[way]
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done = stream.record_event()
        done.synchronize()


class _Buffer:
    """A chunk's worth of page-aligned memory, pinned beside a GPU."""

    def __init__(self, device: torch.device) -> None:
        pages = Pages.of(CHUNK_BYTES)
        self.view, self.memory = memoryview(pages), pages.tensor()
        if device.type == "cuda":
            pages.pin()


def free_bytes(folder: str) -> int:
    """What a user may still write there."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def disk_words(folder: str, error: OSError) -> str:
    """What failed, for a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"train.offload_disk: {folder} is full ({free_bytes(folder) / 2**30:.1f} GiB free): something else is "
            "writing there, or a quota ended. The newest checkpoint is as it was; free room, or give another folder"
        )
    if error.errno == errno.EINVAL:
        return (
            f"train.offload_disk: {folder} lets files be opened for direct reads and writes, and refuses them: give a "
            "folder on a local disk (NVMe)"
        )
    return f"train.offload_disk: {folder}: {error.strerror or error}"


def is_direct(folder: str) -> bool:
    """Whether files there are read and written past the page cache."""
    file, direct = _open(folder)
    file.close()
    return direct


def is_memory(folder: str) -> bool:
    """Whether the file system lies in the host's memory."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    kinds, place = {"/": "", **{mount[1]: mount[2] for mount in mounts}}, os.path.realpath(folder)
    while place not in kinds:
        place = os.path.dirname(place)
    return kinds[place] in ("tmpfs", "ramfs")


def _open(folder: str) -> tuple[Any, bool]:
    """A file without a name, closed with its last reference; whether it is read and written directly."""
    for direct in (os.O_DIRECT, 0):
        flags = os.O_RDWR | os.O_CLOEXEC | direct
        try:
            fd = os.open(folder, flags | os.O_TMPFILE, 0o600)
        except OSError:  # network and stacked file systems know no such files
            path = tempfile.mktemp(prefix=".ds_longft-", dir=folder)  # O_EXCL below: nobody else's
            try:
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                continue
            finally:  # also where it was made and then refused
                Path(path).unlink(missing_ok=True)
        return os.fdopen(fd, "r+b", buffering=0), bool(direct)
    raise AssertionError


def _chunks(tensors: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """(place in the file, bytes) of each chunk."""
    found, at = [], 0
    for tensor in tensors:
        for part in tensor.view(-1).view(torch.uint8).split(CHUNK_BYTES):
            found.append((at, part))
            at += -(-part.numel() // ALIGNED) * ALIGNED
    return found


def _whole(call: Callable[[int, memoryview, int], int], fd: int, view: memoryview, size: int, at: int) -> None:
    """Read or write a number of bytes, rounded up to blocks; the kernel may do a part at a time."""
    done, size = 0, -(-size // ALIGNED) * ALIGNED
    while done < size:
        count = call(fd, view[done:size], at + done)
        if count <= 0:
            raise OSError(errno.EIO, "the file ended early")
        done += count
