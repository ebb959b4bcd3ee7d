"""F3, F4, F5, F6, F19, F20 and retention: damaged, impossible and foreign checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.faults.ranks import Launcher, checkpoints, status, trace

SHARD = "engine/zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture
def finished(golden: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with checkpoints 6 and 8."""
    return Path(shutil.copytree(golden, tmp_path / "out"))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def add_pickle(path: Path) -> None:
    """A shard that nobody wrote, and that would run code when read."""

    class Canary:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(path.parent.parent.parent / "unpickled"),)

    (path.parent / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(pickle.dumps(Canary()))


DAMAGES = [
    (lambda p: os.truncate(p, 100), "has 100 bytes"),
    (lambda p: os.truncate(p, 0), "has 0 bytes"),
    (Path.unlink, "is missing"),
    (flip_bit, "has changed since it was written"),
    (add_pickle, "is not in manifest.json"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_damage_is_found_and_named(finished: Path, damage: Callable[[Path], None], says: str) -> None:
    from tests.faults.alone import find

    damage(finished / "checkpoint-8" / SHARD)
    found, said = find(finished, "auto")
    assert found == finished / "checkpoint-6"
    assert "checkpoint-8 is damaged and passed over: engine/" in said
    assert says in said
    assert not (finished / "unpickled").exists()
    found, said = find(finished, 8)
    assert found is None
    assert says in said


def test_nothing_valid_is_not_a_fresh_start(finished: Path) -> None:
    from tests.faults.alone import find

    for step in (6, 8):
        (finished / f"checkpoint-{step}" / "manifest.json").write_text("{")
    found, said = find(finished, "auto")
    assert found is None
    assert "no checkpoint of" in said
    assert "train.resume to never" in said
    assert "version" not in said


def rewrite_state(folder: Path, change: Callable[[dict], dict]) -> None:
    """Another state.json, sealed as its own."""
    path, manifest = folder / "state.json", json.loads((folder / "manifest.json").read_text())
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    seal = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest["files"]["state.json"] = seal
    (folder / "manifest.json").write_text(json.dumps(manifest))


def of_the_first_format(state: dict) -> dict:
    same = {k: state[k] for k in ("step", "epoch", "step_in_epoch", "tokens_seen", "total_steps", "world", "trained")}
    return same | {"fingerprint": "0123456789abcdef", "wandb_id": None, "eval_due": False, "loss": {"objective": "sft"}}


def of_the_second_format_before_it_had_a_number(state: dict) -> dict:
    return {k: v for k, v in state.items() if k not in ("format", "written_by")}


def of_the_next_format(state: dict) -> dict:
    return state | {"format": 3, "written_by": "9.1.0", "moon": "full"}


def of_the_next_version(state: dict) -> dict:
    return state | {"written_by": "9.1.0"}


def test_a_checkpoint_of_another_version_is_named_with_the_ways_out(
    launcher: Launcher, golden: Path, finished: Path, tmp_path: Path
) -> None:
    """It may be whole and still say too little to be continued exactly: that is no damage."""
    from tests.faults.alone import find

    for step in (6, 8):
        rewrite_state(finished / f"checkpoint-{step}", of_the_first_format)
    found, said = find(finished, "auto")
    assert found is None
    assert "checkpoint-8 is passed over: it was written by an earlier version of ds_longft (state format 1" in said
    assert f"set lora.init_from to {finished}/checkpoint-8, and give a new output_dir" in said
    codes, run = launcher.run(finished)
    assert codes == [64, 64], run.text()
    assert checkpoints(finished) == [6, 8]
    output = tmp_path / "new"  # the way out that was named
    codes, run = launcher.run(output, "--lora.init_from", f"{finished}/checkpoint-8", "--train.max_steps", "1")
    assert codes == [0, 0], run.text()
    first, last = trace(output)[0], [r for r in trace(golden) if r[1] == "eval"][-1]
    assert first == (0, "eval", last[2]), "it begins where the other had ended"


@pytest.mark.parametrize("change", [of_the_second_format_before_it_had_a_number, of_the_next_version])
def test_a_state_that_says_enough_is_continued(finished: Path, change: Callable[[dict], dict]) -> None:
    from tests.faults.alone import find

    rewrite_state(finished / "checkpoint-8", change)
    assert find(finished, "auto") == (finished / "checkpoint-8", "")


def test_a_newer_version_is_named(finished: Path) -> None:
    from tests.faults.alone import find

    rewrite_state(finished / "checkpoint-8", of_the_next_format)
    found, said = find(finished, "auto")
    assert found == finished / "checkpoint-6"
    assert "checkpoint-8 is passed over: it was written by ds_longft 9.1.0 (state format 3), this is" in said


def test_falls_back_and_trains_on(launcher: Launcher, golden: Path, finished: Path) -> None:
    """F3 end to end, and an earlier course's later checkpoint does not come back."""
    flip_bit(finished / "checkpoint-8" / SHARD)
    codes, run = launcher.run(finished)
    assert codes == [0, 0], run.text()
    assert f"resumed from {finished}/checkpoint-6" in run.text(0)
    assert trace(finished) == trace(golden)
    assert checkpoints(finished) == [6, 8]
    assert (finished / "set-aside-checkpoint-8").is_dir()


def test_another_base_model_is_refused(launcher: Launcher, finished: Path, tmp_path: Path) -> None:
    """F20: other weights of the same shapes, as an -Instruct beside its base; the same ones elsewhere are no other."""
    model = Path(yaml.safe_load((finished / "config.yaml").read_text())["model"]["path"])
    moved = Path(shutil.copytree(model, tmp_path / "moved"))
    codes, run = launcher.run(finished, "--model.path", str(moved))
    assert codes == [0, 0], run.text()
    weights = load_file(moved / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    codes, run = launcher.run(finished, "--model.path", str(moved))
    assert codes == [64, 64], run.text()
    assert "model.path leads to other weights than those the run began with" in run.text(0)
    assert checkpoints(finished) == [6, 8]


def test_one_failed_save_is_survived(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    """F5: the kernel refuses one rank's file; the run goes on, and the next save holds."""
    output = tmp_path / "out"
    fault = {"point": "write_limit", "step": 4, "bytes": 2000}
    codes, run = launcher.run(output, faults={1: fault})
    assert codes == [0, 0], run.text()
    assert "SAVE FAILED (1 in a row" in run.text(0)
    assert "rank 1" in run.text(0)
    assert checkpoints(output) == [6, 8]
    assert not list(output.glob(".tmp-*"))
    assert trace(output) == trace(golden)


def test_two_failed_saves_in_a_row_end_the_run(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    fault = {"point": "write_limit", "step": 4, "bytes": 2000, "for_good": True}
    codes, run = launcher.run(output, faults={0: fault})
    assert codes == [64, 64], run.text()
    assert checkpoints(output) == [2]
    assert not list(output.glob(".tmp-*"))
    assert "could not be written" in status(output)["error"]


def test_no_room_is_seen_before_anything_is_written(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(output, faults={0: {"point": "no_room", "step": 4}})
    assert codes == [0, 0], run.text()
    assert "0.00 GiB free" in run.text(0)
    assert checkpoints(output) == [6, 8]


def test_output_below_a_file(launcher: Launcher, tmp_path: Path) -> None:
    """F6: refused before a model is loaded."""
    (tmp_path / "file").write_text("")
    codes, run = launcher.run(tmp_path / "file" / "out")
    assert codes == [64, 64], run.text()
    assert "is a file: give another folder" in run.text(0)
    assert "model built" not in run.text()


def test_manifest_lists_every_file_and_lora_keeps_the_base_out(golden: Path) -> None:
    folder = golden / "checkpoint-8"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert on_disk == set(files) | {"manifest.json"}
    base = sum(p.stat().st_size for p in (golden.parent).rglob("model.safetensors"))
    assert base == 0
    import torch

    model = torch.load(folder / "engine/zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    assert all("lora" in name for name in model["module"])
