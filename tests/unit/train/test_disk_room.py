"""A disk that is too small or too slow for what the plan puts there is refused, with what was measured and is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_longft.config.run_config import RunConfig
from ds_longft.decide.decisions import Run, decide
from ds_longft.decide.memory import predict
from ds_longft.decide.setting import GIB
from ds_longft.errors import ConfigError
from ds_longft.train import disk_room
from ds_longft.train.disk_room import check_disk, measured_gb_s
from tests.unit.decide.shapes import LLAMA_8B
from tests.unit.decide.test_advice import known

CUDA = torch.device("cuda")
ALONE: Any = SimpleNamespace(gather=lambda value: [value])


def run_with(folder: Path, gb_s: float, host_gib: float = 8.0, length: str = "256K") -> Run:
    """A sample of Llama-8B that one H200 does not hold the kept tensors of."""
    train = {"offload_disk": str(folder), "offload_host_gib": host_gib}
    config = RunConfig.model_validate({"data": {"max_length_tokens": length}, "train": train, "lora": {"r": 16}})
    return replace(known(config, LLAMA_8B), disk_gb_s=gb_s)


def test_a_disk_that_keeps_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_with(tmp_path, 5.0)
    made = decide(run)
    memory = predict(run.facts, made.setting, run.gpu)
    assert memory.disk > 0
    assert memory.host <= 8 * GIB
    monkeypatch.setattr(disk_room, "free_bytes", lambda _: 4 * memory.disk)
    assert f"{memory.disk / GIB:.1f} GiB of a step" in (check_disk(run, made, CUDA, ALONE) or "")


@pytest.mark.parametrize(
    ("gb_s", "free", "says"), [(0.1, 1e13, "needs .* GB/s: steps"), (5.0, GIB, "has 1.0 GiB free")]
)
def test_too_slow_or_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gb_s: float, free: float, says: str
) -> None:
    run = run_with(tmp_path, gb_s)
    monkeypatch.setattr(disk_room, "free_bytes", lambda _: free)
    with pytest.raises(ConfigError, match=f"train.offload_disk: {tmp_path} .*{says}"):
        check_disk(run, decide(run), CUDA, ALONE)


def test_memory_is_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_room, "is_memory", lambda _: True)
    with pytest.raises(ConfigError, match=r"is memory \(tmpfs\), no disk"):
        measured_gb_s(str(tmp_path), CUDA, 1, ALONE)


@pytest.mark.parametrize("direct", [True, False])
def test_the_page_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    run = run_with(tmp_path, 5.0)
    monkeypatch.setattr(disk_room, "free_bytes", lambda _: 1e13)
    monkeypatch.setattr(disk_room, "is_direct", lambda _: direct)
    assert ("page cache" in (check_disk(run, decide(run), CUDA, ALONE) or "")) != direct


def test_nothing_goes_there_that_fits_elsewhere(tmp_path: Path) -> None:
    run = run_with(tmp_path, 0.001, length="16K")
    assert "nothing has to go" in (check_disk(run, decide(run), CUDA, ALONE) or "")


def test_every_rank_hears_of_a_folder_that_one_lacks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        measured_gb_s(str(tmp_path / "nowhere"), torch.device("cpu"), 1, ALONE)
    assert measured_gb_s(str(tmp_path), torch.device("cpu"), 32, ALONE) > 0
