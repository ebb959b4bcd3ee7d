"""What a run writes of its own prediction when it starts, with a GPU that is only said to be there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig

from ds_longft.config.ds_json import DeepSpeedSettings
from ds_longft.config.run_config import RunConfig
from ds_longft.decide.plan_json import foresee_run
from ds_longft.layout import ParallelLayout
from ds_longft.train.install import decided, known_run
from tests.unit.decide.shapes import SMOLLM2

ZERO3 = DeepSpeedSettings({"zero_optimization": {"stage": 3}}, sp=None, stage=3)


def foreseen(folder: Path, memory_gib: float) -> dict[str, Any] | None:
    AutoConfig.for_model(**SMOLLM2).save_pretrained(folder)
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder), "rope": {"type": "abf", "theta": 1e7}},
            "lora": None,
            "data": {"max_length_tokens": "128K"},
        }
    )
    layout, settings = cast(ParallelLayout, SimpleNamespace(sp=1, world=1)), ZERO3
    known = known_run(config, settings, layout, torch.device("cuda"), memory_gib=memory_gib, kernel="flash-attn-4")
    return foresee_run(known, decided(known, torch.device("cuda")))


def test_the_demonstration_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=int(139.8 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = foreseen(tmp_path, 139.8)
    assert found is not None
    assert found["tokens"] == 131072
    assert 10 < found["peak_gib"] < 131
    assert 1 < found["step_s"] < 30
    beside_another = foreseen(tmp_path, 24.0)  # another process holds the rest
    assert beside_another is not None
    assert beside_another["peak_gib"] < 24 < found["peak_gib"]
    assert beside_another["rates"] == found["rates"] == "measured"


def test_a_cpu_run_does_what_is_configured(tmp_path: Path) -> None:
    AutoConfig.for_model(**SMOLLM2).save_pretrained(tmp_path)
    config = RunConfig.model_validate({"model": {"path": str(tmp_path)}, "train": {"recompute": "sqrt"}})
    layout = cast(ParallelLayout, SimpleNamespace(sp=1, world=1))
    decisions = decided(known_run(config, ZERO3, layout, torch.device("cpu")), torch.device("cpu"))
    assert (decisions.setting.recompute, decisions.setting.tile_tokens) == ("sqrt", None)
    assert (decisions.keep, decisions.planned) == (None, False)
