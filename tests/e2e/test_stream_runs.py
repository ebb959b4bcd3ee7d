"""A run on a stream: the same on other ranks, and after a restart in the middle of a window."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.job import write_rows
from tests.faults.ranks import Launcher, trace

ROWS = 14
STEPS = 10  # over the end of the set


@pytest.fixture(scope="module")
def keys(job: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run whose rows carry 200 KB each that nothing is made of: five or six of them fill a window of 1 MiB."""
    folder = tmp_path_factory.mktemp("stream")
    rows = [json.loads(line) | {"much": "x" * 200_000} for line in write_rows(folder / "a", range(ROWS)).open()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "--data.train", str(folder / "rows.jsonl"), "--data.stream_window_mib", "1", "--train.epochs", "1",
        "--train.max_steps", str(STEPS), "--train.eval_every_steps", "5", "--train.keep_checkpoints", "9",
        "--data.cache_dir", str(folder / "cache"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(keys: list[str], ranks: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks that share each sample."""
    output = tmp_path_factory.mktemp("whole") / "out"
    codes, run = ranks.run(output, *keys, "--sp", "2")
    assert codes == [0, 0], run.text()
    assert "steps in window 0 of the stream, 10 in all" in run.text()
    windows = {json.loads(p.read_text())["epoch"] for p in output.glob("checkpoint-*/state.json")}
    assert len(windows) > 2
    return output


def test_a_restart_in_a_window_changes_nothing(whole: Path, keys: list[str], ranks: Launcher, tmp_path: Path) -> None:
    """The windows are gone by then, and made again."""
    states = {p.parent: json.loads(p.read_text()) for p in whole.glob("checkpoint-*/state.json")}
    inside = [p for p, s in states.items() if s["epoch"] > 0 and s["step_in_epoch"] > 0 and s["step"] < STEPS - 2]
    middle = min(inside, key=lambda folder: states[folder]["step"])
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(middle, output / middle.name)
    shutil.copy(whole / "metrics.jsonl", output)
    cache = str(tmp_path / "cache")
    codes, run = ranks.run(output, *keys, "--sp", "2", "--data.cache_dir", cache)
    assert codes == [0, 0], run.text()
    assert f"resumed from {output / middle.name}" in run.text().replace("\n", "")
    assert trace(output) == trace(whole)
    assert (output / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    facts = json.loads((output / "data.json").read_text())
    assert any("of a stream" in part for part in facts["parts"])


def test_other_ranks_have_the_same_losses(whole: Path, keys: list[str], ranks: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    codes, run = ranks.run(output, *keys, "--sp", "1", "--train.gradient_accumulation_steps", "1")
    assert codes == [0, 0], run.text()
    for ours, theirs in zip(trace(output), trace(whole), strict=True):
        numbers = [value for value in theirs if value != "eval"]
        assert [value for value in ours if value != "eval"] == pytest.approx(numbers, rel=1e-5)


def test_other_rows_in_the_window_are_another_run(
    whole: Path, keys: list[str], ranks: Launcher, tmp_path: Path
) -> None:
    """A file of the same name and size, with other words in it."""
    source = Path(keys[1])
    changed = tmp_path / source.name
    changed.write_text(source.read_text().replace("It is", "It iz"))
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(whole / "checkpoint-4", output / "checkpoint-4")
    codes, run = ranks.run(output, *keys, "--sp", "2", "--data.train", str(changed))
    assert codes == [64, 64], run.text()
    assert "the training rows are others" in run.text()
