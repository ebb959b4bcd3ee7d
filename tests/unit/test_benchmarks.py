"""The benchmarks compare what they say they compare: the same sample, the same start, every gradient."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.compare import PASS, wrong
from benchmarks.length import timed_before
from benchmarks.longest import longest
from benchmarks.work import compare_gradients, compared, fingerprint, is_settled, lengths_of, sample, start, step_times

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "tests" / "gpu").glob("*.py")))
def test_what_runs_on_gpus_only_imports_here(name: str) -> None:
    importlib.import_module(f"tests.gpu.{name}")


def test_every_measured_step_can_be_predicted_again() -> None:
    """Its command is read: words with spaces are quoted."""
    cases = [case for case, _ in timed_before(ROOT / "benchmarks" / "results.jsonl", "h200")]
    assert len(cases) > 50
    assert {case.shape for case in cases} >= {"llama8b", "hybrid8b", "mamba8b"}


def test_lengths_of_documents_as_they_are_written() -> None:
    assert lengths_of("16384x2,1000") == [16384, 16384, 1000]
    draw = lengths_of("longalign:131072")
    assert sum(draw) == 131072
    assert draw == lengths_of("longalign:131072")
    assert len(set(draw)) > 4
    assert max(draw) <= 65536


@pytest.mark.parametrize(
    ("times", "done", "value", "count"),
    [
        ([34.0, 23.6, 20.0, 20.1], True, 20.05, 2),
        ([11.1, 8.7, 8.6], False, 8.65, 2),  # three steps are too few
        ([20.7, 9.2, 7.12, 6.5], False, 6.5, 1),
        ([7.0, 7.0, 7.1, 7.0, 7.05], True, 7.0, 5),
    ],
)
def test_steps_are_settled_when_nothing_compiles_any_more(
    times: list[float], done: bool, value: float, count: int
) -> None:
    assert is_settled(times) == done
    found = step_times(times)
    assert (found["value"], found["settled_steps"]) == (value, count)
    assert found["min_s"] == min(times[-count:])


@pytest.mark.parametrize(("limit", "found"), [(100, 96), (64, 64), (63, 0), (250, 240), (1000, 240)])
def test_the_longest_that_fits(limit: int, found: int) -> None:
    """16 by 16 from 64 to below 256, the lowest first, none twice."""
    tried: list[int] = []
    assert longest(lambda n: (tried.append(n), n <= limit)[1], 64, 256, 16) == found
    assert tried[0] == 64
    assert len(set(tried)) == len(tried) <= 5


def test_sample_has_no_target_across_documents() -> None:
    pack = sample([5, 3, 8], 100, dp_rank=0)
    assert pack.position_ids.tolist() == [*range(5), *range(3), *range(8)]
    assert (np.flatnonzero(pack.labels == -100) == [4, 7, 15]).all()
    assert (pack.labels[:4] == pack.input_ids[1:5]).all()
    assert pack.loss_weights.sum() == 13
    assert (pack.input_ids != sample([5, 3, 8], 100, dp_rank=1).input_ids).any()


def test_fingerprint_sees_one_weight_and_no_type() -> None:
    model = torch.nn.Linear(4, 4).bfloat16()
    before = fingerprint(model)
    assert fingerprint(model.float()) == before
    with torch.no_grad():
        model.weight[2, 1] += 0.5
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda g: g, None),
        (lambda g: 1.02 * g, "norm off by 0.02"),
        (lambda g: -g, "cosine -1.0 of b.lora_B"),
        (lambda g: 0 * g, "norm 0.000e+00"),
    ],
)
def test_one_wrong_gradient_among_right_ones_is_found(tmp_path: Path, change, problem: str | None) -> None:
    ours = {name: torch.randn(8, 16, generator=torch.Generator().manual_seed(1)) for name in ("a.lora_B", "b.lora_B")}
    save_file(ours, tmp_path / "ours")
    save_file({**ours, "b.lora_B": change(ours["b.lora_B"])}, tmp_path / "peer")
    result = {"fingerprint": "same", "loss_first": 2.0}
    found = wrong(result, result, {}, compare_gradients(tmp_path / "peer", tmp_path / "ours"), PASS["bf16"])
    if problem is None:
        assert not found
    else:
        assert problem in found[0]


def test_other_weights_or_another_loss_are_found() -> None:
    ours = {"fingerprint": "a", "loss_first": 2.0}
    assert "weights" in wrong(ours, {**ours, "fingerprint": "b"}, {}, None, PASS["bf16"])[0]
    assert "apart" in wrong(ours, {**ours, "loss_first": 2.001}, {}, None, PASS["bf16"])[0]
    assert wrong(ours, {"error": "out of memory"}, {}, None, PASS["bf16"]) == ["peer: out of memory"]


def test_what_stopped_a_measurement_is_named_and_not_a_warning_before_it(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        "print('op rope could not be imported: ImportError: no tanh')\nraise MemoryError('out of memory')\n"
    )
    for ranks in (0, 1):  # torchrun raises behind it
        assert start(str(script), ranks, [], tmp_path, 60) == {"error": "MemoryError: out of memory"}


@pytest.mark.parametrize("ranks", [0, 2])
def test_what_takes_too_long_tells_where_it_was_and_leaves_nothing_behind(tmp_path: Path, ranks: int) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank-' + os.environ.get('RANK', '0')).write_text(str(os.getpid()))\n"
        "def waits_for_ever():\n    time.sleep(900)\n"
        "print('step 0 loss 1.5000 2.00 s', flush=True)\nwaits_for_ever()\n"
    )
    said = start(str(script), ranks, [], tmp_path, 3 + 9 * (ranks > 0))["error"]
    assert "behind step 0 loss 1.5000 2.00 s, in stuck.py:4 waits_for_ever < stuck.py:6 <module>" in said
    for pid in tmp_path.glob("rank-*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_compared_are_trained_parameters_with_a_gradient() -> None:
    assert compared("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight")
    assert compared("model.layers.0.self_attn.k_proj.weight")
    assert compared("model.norm.weight")
    assert not compared("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    assert not compared("model.embed_tokens.weight")


def test_kernels_are_measured_by_name_as_documented() -> None:
    words = ["--device", "cpu", "--mixes", "1x64", "--kernels", "cpu,math", "--dtype", "float32"]
    command = [sys.executable, "benchmarks/attention_kernels.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = [json.loads(line)["what"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert {what.split(", ")[1] for what in measured} == {"cpu", "math"}
    assert "1 x 64           cpu  first of the table that fits" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("row", ["256 sp2 lora", "2x128 sp2 lora, ringmaster", "2x128 sp1 lora, ringmaster"])
def test_our_step_and_the_peers_have_the_same_loss_and_gradients(row: str, tmp_path: Path) -> None:
    """One sample over two CPU ranks in float32, each side a process group of its own."""
    out = tmp_path / "results.jsonl"
    command = [sys.executable, "benchmarks/compare.py", "--tiny", "--grads", "--steps", "1", "--only", row]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--append", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = {line["what"]: line for line in map(json.loads, out.read_text().splitlines())}
    gradients = lines[f"gradients {row}"]
    assert gradients["modules"] == 14  # seven linears in each of two layers
    assert gradients["worst_cosine"] > 1 - 1e-6
    assert gradients["worst_norm_error"] < 1e-4
    assert lines[f"floor share {row}"]["floor_s"] > 0
