"""The measuring functions on a CPU, with small sizes: they return rates, and the file they make can be read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ds_longft.errors import ConfigError
from ds_longft.plan import calibrate
from ds_longft.plan.setting import Gpu
from ds_longft.sequence.kernels.table import KERNELS, kernel_by_name

CPU = torch.device("cpu")


def test_rates_are_measured() -> None:
    cold, warm = calibrate.products(CPU, (64, 64, 64), warm_s=0.01)
    assert cold > 0
    assert warm > 0
    rates = calibrate.attention_rates(kernel_by_name("cpu"), CPU, (64, 128), (4, 2, 16))
    assert [tokens for tokens, _ in rates["forward"]] == [64, 128]
    assert all(rate > 0 for _, rate in rates["backward"])
    assert [k.name for k in KERNELS if calibrate.attention_rates(k, CPU, (64,), (4, 2, 16))] == ["cpu"]
    assert calibrate.elementwise_gb_s(CPU, 1 << 16) > 0
    assert calibrate.host_gb_s(CPU, 1 << 16) > 0


def test_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(ConfigError, match="torch sees none"):
        calibrate.calibrate(str(tmp_path / "gpu.json"))


def test_a_calibration_file_is_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(asdict(Gpu.load("h200"))))
    assert Gpu.load(str(path)) == Gpu.load("h200")
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(ConfigError, match="missing"):
        Gpu.load(str(path))
    assert calibrate._nearest("NVIDIA A100-SXM4-80GB").name.startswith("NVIDIA A100")
    assert calibrate._nearest("NVIDIA H200").name == "NVIDIA H200"
