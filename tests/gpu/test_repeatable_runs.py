"""`train.deterministic`: whole runs give the same losses and weights to the bit, repeated or resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faults.assets import pair_keys, write_job
from tests.faults.ranks import Launcher, trace

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

WORLD = min(2, torch.cuda.device_count())


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    os.environ.update(LONGFT_TEST_ON_GPUS="1", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    launcher = Launcher(write_job(tmp_path_factory.mktemp("job")))
    yield launcher
    launcher.close()


@pytest.mark.parametrize("kind", ["adapters", "all weights", "pairs"])
def test_runs_repeat_to_the_bit_and_so_do_resumed_ones(launcher: Launcher, tmp_path: Path, kind: str) -> None:
    more = {"adapters": (), "all weights": ("--lora", "null"), "pairs": pair_keys(launcher.config)}[kind]
    keys = ("--sp", str(WORLD), "--train.deterministic", "true", "--train.epochs", "5", *more)  # 20 steps
    for name in ("one", "two"):
        codes, run = launcher.run(tmp_path / name, *keys, world=WORLD, timeout_s=200)
        assert codes == [0] * WORLD, run.text()
    fault = {WORLD - 1: {"point": "step", "step": 13, "do": "SIGUSR1"}}
    codes, run = launcher.run(tmp_path / "resumed", *keys, world=WORLD, timeout_s=200, faults=fault)
    assert codes == [75] * WORLD, run.text()
    codes, run = launcher.run(tmp_path / "resumed", *keys, world=WORLD, timeout_s=200)
    assert codes == [0] * WORLD, run.text()
    weights = "model.safetensors" if kind == "all weights" else "adapter_model.safetensors"
    for other in ("two", "resumed"):
        assert trace(tmp_path / other) == trace(tmp_path / "one"), other
        assert (tmp_path / other / weights).read_bytes() == (tmp_path / "one" / weights).read_bytes(), other
