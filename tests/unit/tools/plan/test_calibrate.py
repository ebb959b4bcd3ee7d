"""The measuring functions on a CPU, with small sizes: they return rates, and the file they make can be read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_longft.decide.setting import Gpu
from ds_longft.errors import ConfigError
from ds_longft.sequence.kernels.table import KERNELS, kernel_by_name
from ds_longft.tools.plan import calibrate

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
    assert calibrate._nearest("NVIDIA A100-SXM4-80GB").name.startswith("NVIDIA A100")
    assert calibrate._nearest("NVIDIA H200").name == "NVIDIA H200"


RATES = asdict(Gpu.load("h200"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{not json", ["Invalid JSON"]),
        ("[1]", ["should be an object"]),
        ({"name": "x", "extra": 1}, ["memory_gib: Field required", "capability: Field required", "extra: "]),
        (RATES | {"memory_gib": "much", "host_gb_s": 0}, ["memory_gib: ", "host_gb_s: "]),
        (RATES | {"attention_tflops": {}}, ["attention_tflops: "]),
        (RATES | {"attention_tflops": {"varlen": {"forward": []}}}, ["attention_tflops.varlen.forward: "]),
        (RATES | {"attention_tflops": {"varlen": {"forward": [[1, 2]]}}}, ["expected forward and backward"]),
        (RATES | {"attention_tflops": {"flash": {}}}, ["flash is no attention kernel; known are flash-attn-4"]),
    ],
)
def test_a_file_that_is_none_is_told_by_its_keys(content: Any, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        Gpu.load(str(path))
    assert all(words in str(caught.value) for words in [str(path), "--calibrate", *expected])
