"""Runs whose frozen weights lie elsewhere: what they write is what any run writes, and they go on from each other's checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.faults.ranks import Launcher, trace

KEYS = ("--sp", "2", "--ds_config", "ds_configs/zero3_sp.json", "--model.base")


def test_another_base_goes_on_to_the_bit(ranks: Launcher, tmp_path: Path) -> None:
    """From the host; the second half sharded, from a checkpoint: losses, evaluations and the adapter are the same."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    codes, run = ranks.run(whole, *KEYS, "host", timeout_s=240.0)
    assert codes == [0, 0], run.text()
    output.mkdir()
    shutil.copytree(whole / "checkpoint-4", output / "checkpoint-4")
    shutil.copy(whole / "metrics.jsonl", output)
    codes, run = ranks.run(output, *KEYS, "sharded", timeout_s=240.0)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(whole)
    assert (output / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert "weights trained" in run.text()
