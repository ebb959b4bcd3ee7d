"""Whole preference runs from the command line: they learn, resume exactly, and a precomputed reference is the live one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_longft.cli import main as cli
from tests.e2e.job import WINDOW, write_model
from tests.e2e.test_runs import losses
from tests.faults.ranks import Launcher, trace


def write_pairs(path: Path, numbers: range) -> Path:
    rows = []
    for i in numbers:
        question = f"def times(a, b): what is {i} times {i + 3}? " + "Think about it. " * (i % 5)
        answers = {"chosen": f"It is {i * (i + 3)}.", "rejected": "Ask someone else" + "!" * (i % 4)}
        rows.append({"prompt": question, **answers})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pair_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.yaml: 2 packs a step, 6 steps, saved and evaluated every 2."""
    folder = tmp_path_factory.mktemp("pairs")
    write_model(folder / "model")
    run: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "objective": "dpo",
        "model": {"path": str(folder / "model")},
        "lora": {"r": 4, "alpha": 16},
        "data": {
            "train": [str(write_pairs(folder / "train.jsonl", range(16)))],
            "eval": [str(write_pairs(folder / "eval.jsonl", range(16, 22)))],
            "max_length_tokens": WINDOW,
            "workers": 1,
            "cache_dir": str(folder / "cache"),
        },
        "optim": {"learning_rate": 1e-2, "warmup_steps": 0},
        "train": {
            "epochs": 2, "max_steps": 6, "gradient_accumulation_steps": 2, "save_every_steps": 2, "eval_every_steps": 2,
            "keep_checkpoints": 3,
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def launcher(pair_job: Path):
    launcher = Launcher(pair_job)
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def whole(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the job on two ranks that share each pack."""
    output = tmp_path_factory.mktemp("whole") / "out"
    codes, run = launcher.run(output, "--sp", "2", timeout_s=120.0)
    assert codes == [0, 0], run.text()
    return output


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_loss_falls_and_accuracy_rises(whole: Path) -> None:
    steps, evals = [r for r in records(whole) if "loss" in r], [r for r in records(whole) if "eval_loss" in r]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-6)  # the model is its reference: -log(1/2)
    assert steps[-1]["loss"] < 0.4
    assert evals[-1]["eval_loss"] < 0.4
    assert evals[-1]["eval_rewards/accuracies"] == 1.0
    last = steps[-1]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"])
    assert last["logps/chosen"] < 0
    assert "preference pairs, sigmoid, beta 0.1" in (whole / "README.md").read_text()


def test_a_resumed_run_is_the_uninterrupted_one(whole: Path, launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", output)
    codes, run = launcher.run(output, "--sp", "2", timeout_s=120.0)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(whole)


def test_a_precomputed_reference_in_two_passes_on_one_process(
    whole: Path, pair_job: Path, launcher: Launcher, tmp_path: Path
) -> None:
    keys = ["--dpo.reference", "precomputed", "--dpo.passes", "two"]
    codes, run = launcher.run(tmp_path / "none", *keys, world=1)
    assert codes == [64]
    assert "data ref_logps" in run.text()
    assert cli(["data", "ref_logps", str(pair_job), "--ranks", "2", "--json"]) == 0
    codes, run = launcher.run(tmp_path / "out", *keys, world=1)
    assert codes == [0], run.text()
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), rel=1e-5)
    expected = trace(tmp_path / "out")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{step}")
    codes, run = launcher.run(tmp_path / "out", *keys, world=1)
    assert codes == [0], run.text()
    assert "at step 2" in run.text()
    assert trace(tmp_path / "out") == expected


def test_all_weights_against_a_frozen_copy(launcher: Launcher, tmp_path: Path) -> None:
    keys = ["--lora", "null", "--train.max_steps", "3", "--optim.learning_rate", "1e-3"]
    codes, run = launcher.run(tmp_path / "two", "--sp", "2", "--train.mlp_tile_tokens", "64", *keys)
    assert codes == [0, 0], run.text()
    codes, run = launcher.run(tmp_path / "one", *keys, world=1)
    assert codes == [0], run.text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "two")[-1] < 0.69
    assert not any("reference" in name for name in (p.name for p in (tmp_path / "two").iterdir()))


def test_a_loss_that_is_not_finite_is_skipped(launcher: Launcher, tmp_path: Path) -> None:
    fault = {"point": "poison", "step": 3, "steps": 1, "what": "loss"}
    codes, run = launcher.run(
        tmp_path / "out", "--train.on_nonfinite", "skip", "--dpo.passes", "two", faults={1: fault}
    )
    assert codes == [0, 0], run.text()
    assert [r["step"] for r in records(tmp_path / "out") if "skipped" in r] == [3]
    report = json.loads((tmp_path / "out" / "nonfinite-step-3.json").read_text())
    assert all("train.jsonl:" in origin for r in report["ranks"] for pack in r["packs"] for origin in pack["origins"])
