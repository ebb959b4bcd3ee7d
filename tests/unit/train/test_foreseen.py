"""What a run writes of its own prediction when it starts, with a GPU that is only said to be there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig

from ds_longft.config import RunConfig
from ds_longft.layout import ParallelLayout
from ds_longft.train.run import _foreseen
from tests.unit.plan.shapes import SMOLLM2


def foreseen(folder: Path, device: str, memory_gib: float | None) -> dict[str, Any] | None:
    AutoConfig.for_model(**SMOLLM2).save_pretrained(folder)
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder), "rope": {"type": "abf", "theta": 1e7}},
            "lora": None,
            "data": {"max_length_tokens": "128K"},
        }
    )
    layout = cast(ParallelLayout, SimpleNamespace(sp=1, world=1))
    engine_config = {"zero_optimization": {"stage": 3}}
    return _foreseen(config, engine_config, layout, torch.device(device), "flash-attn-4", memory_gib)


def test_the_demonstration_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=int(139.8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = foreseen(tmp_path, "cuda", 139.8)
    assert found is not None
    assert found["tokens"] == 131072
    assert 10 < found["peak_gib"] < 131
    assert 1 < found["step_s"] < 30
    beside_another = foreseen(tmp_path, "cuda", 24.0)  # another process holds the rest
    assert beside_another is not None
    assert beside_another["peak_gib"] < 24 < found["peak_gib"]
    assert beside_another["rates"] == found["rates"] == "measured"


def test_nothing_is_foreseen_on_a_cpu(tmp_path: Path) -> None:
    assert foreseen(tmp_path, "cpu", None) is None
