"""A disk that is full for a while costs no record; every minute of waiting has its end."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_longft.config.run_config import LogConfig
from ds_longft.train import durable
from ds_longft.train.durable import DurableLines, as_readable_as_the_folder, insist
from ds_longft.train.metrics import Records
from tests.unit.train.test_metrics import record


def test_weights_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    for mode, expected in ((0o755, 0o644), (0o700, 0o600), (0o770, 0o660)):
        tmp_path.chmod(mode)
        as_readable_as_the_folder(tmp_path)
        assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == expected


class FullDisk:
    """Takes so many bytes more, then none, until it has room again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.write = os.pwrite
        monkeypatch.setattr(durable.os, "pwrite", self)

    def __call__(self, file: int, data: bytes, offset: int) -> int:
        if self.room is None:
            return self.write(file, data, offset)
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.write(file, data[: self.room], offset)
        self.room -= written
        return written


def test_lines_wait_for_room_and_none_is_lost_or_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = tmp_path / "lines", []
    disk, lines = FullDisk(monkeypatch), DurableLines(path, said.append)
    lines.write("first")
    disk.room = 4  # in the middle of the second line
    lines.write("second")
    assert path.read_text() == "first\nseco"
    for word in ("third", "fourth"):
        lines.write(word)
    assert len(said) == 1
    assert "kept in memory" in said[0]
    disk.room = None
    lines.write("fifth")
    assert path.read_text().split() == ["first", "second", "third", "fourth", "fifth"]
    assert said[1] == "lines can be written again, and lacks nothing"


def test_training_goes_on_over_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch)
    records = Records(tmp_path, LogConfig(), total_steps=9, first_step=0, active=True)
    for step in range(1, 9):
        disk.room = 0 if 3 <= step <= 6 else None
        records.step(record(step, 1.0))
    disk.room = 0
    records.step(record(9, 1.0))
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        disk.room = None if len(waited) == 3 else 0  # a minute later

    monkeypatch.setattr(durable.time, "sleep", pause)
    records.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in written] == list(range(1, 10))
    assert len(waited) == 3
    assert (tmp_path / "loss.png").exists()


def test_insisting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def work() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "PAUSE_S", 0.01)
    error = insist(work, "loss.png", said.append, patience_s=0.05)
    assert isinstance(error, OSError)
    assert said[-1] == "loss.png could not be written: [Errno 28] No space left on device"
    assert len(said) == 2
