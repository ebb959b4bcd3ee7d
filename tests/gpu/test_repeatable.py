"""`train.deterministic`: kernels give the same gradients to the bit, and so do whole runs, repeated or resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_longft.batch import Documents
from ds_longft.sequence.kernels import KERNELS, AttentionSpec, Job, Saved, kernel_by_name
from tests.faults.assets import pair_keys, write_job
from tests.faults.ranks import Launcher, trace
from tests.gpu.test_kernels import random_pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NAMES = [kernel.name for kernel in KERNELS if kernel.name != "cpu"]
WORLD = min(2, torch.cuda.device_count())
CASES = {
    "one long": ((70000,), None),
    "one long, window": ((70000,), 1000),
    "long and short": ((40000, 20000, 5, 33000), None),
    "short": ((4096,) * 8, None),
    "tiny": ((700, 1, 130, 1, 1025), None),
}


@pytest.fixture
def _switched_on() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_switched_on")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("lengths", "window"), CASES.values(), ids=CASES)
def test_gradients_repeat_to_the_bit(name: str, lengths: tuple[int, ...], window: int | None) -> None:
    if name == "math" and max(lengths) > 5000:
        pytest.skip("too slow for this length")
    kernel, spec = kernel_by_name(name), AttentionSpec(128**-0.5, window, None, True)
    reason = kernel.refuses(Job("cuda", torch.bfloat16, 128, spec, torch.cuda.get_device_capability()))
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    q, k, v, dout, borders = random_pack(lengths, 8, 2, 128)
    out, lse = kernel.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    first = kernel.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
    for _ in range(2):
        again = kernel.backward(dout, Saved(q, k, v, out, lse), Documents(borders, tuple(lengths)), spec)
        assert [torch.equal(a, b) for a, b in zip(first, again, strict=True)] == [True] * 3
    reference = kernel_by_name("varlen")  # nothing to build; checked against float32 itself
    usual_out, usual_lse = reference.forward(q, k, v, Documents(borders, tuple(lengths)), spec)
    usual = reference.backward(dout, Saved(q, k, v, usual_out, usual_lse), Documents(borders, tuple(lengths)), spec)
    for a, b in zip(first, usual, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2


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
