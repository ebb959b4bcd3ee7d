"""F19, F20: a resume with another value of every key there is: refused with both values, in force from there on, equal to
rounding, or equal bit for bit, as the key says of itself where it is declared.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from transformers import LlamaConfig

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.messages import _models_of, all_keys, on_resume
from ds_longft.config.read import load_run_config
from ds_longft.config.run_config import DpoConfig, RunConfig
from ds_longft.config.section import OnResume
from ds_longft.errors import CheckpointError
from ds_longft.train.resume_rules import (
    TrainState,
    changes_since,
    refuse_another_run,
    what_decides,
    what_may_change,
    what_the_model_is,
)
from tests.faults.assets import TEMPLATE
from tests.faults.ranks import Launcher, checkpoints, trace


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, OnResume]]:
    """(key, its class) of every key of the config, those of a source too; fails where a key has none or several."""
    sections = {key.rpartition(".")[0] for key in all_keys()}
    for name, field in section.model_fields.items():
        key = prefix + name
        marks = on_resume(field)
        if key in sections and key != "lora":
            assert marks == [], f"{key} is a section: its keys have classes"
        else:
            assert len(marks) == 1, f"{key} is declared as {marks}: it needs one of {list(OnResume)}"
            yield key, marks[0]
        for model in _models_of(field.annotation):
            yield from leaves(model, f"{key}.")


CLASSES = dict([*leaves(), *leaves(SourceConfig, "data.train[].")])

MOVED, SAME_TEMPLATE, OTHER_STAGE = "{moved}", "{template}", "{stage2}"
ROPE = ("--model.rope.type", "linear", "--model.rope.factor", "2")

# Another value of each key, with what else it needs to be allowed.
OTHERS: dict[str, tuple[str, ...]] = {
    "ds_config": ("--ds_config", OTHER_STAGE),
    "output_dir": (),  # moved by the test
    "sp": ("--sp", "1", "--train.gradient_accumulation_steps", "1"),
    "seed": ("--seed", "1"),
    "objective": ("--objective", "dpo", "--data.train", "{pairs}", "--lora.dropout", "0"),
    "model.path": ("--model.path", "{model}"),
    "model.trust_remote_code": ("--model.trust_remote_code", "true", "--model.revision", "0" * 40),
    "model.dtype": ("--model.dtype", "bf16"),
    "model.kernel": ("--model.kernel", "math"),
    "model.liger": ("--model.liger", "off"),
    "model.random_weights": ("--model.random_weights", "true"),
    "model.base": ("--model.base", "engine"),  # others turn ZeRO-3 into stage 2, which a run cannot change: test_base.py
    "model.quantize": ("--model.quantize", "int8"),
    "model.unproved": ("--model.unproved", "true"),
    "model.add_tokens": ("--ds_config", OTHER_STAGE, "--model.add_tokens", "<a>,<b>"),
    "model.train_added": ("--ds_config", OTHER_STAGE, "--model.add_tokens", "<a>", "--model.train_added", "false"),
    "model.rope.type": ROPE,
    "model.rope.factor": ROPE,
    "model.rope.theta": ("--model.rope.type", "abf", "--model.rope.theta", "20000"),
    "model.rope.attention_factor": ("--model.rope.type", "yarn", "--model.rope.factor", "2", "--model.rope.attention_factor", "1.5"),
    "lora": ("--lora", "null"),
    "lora.r": ("--lora.r", "8"),
    "lora.alpha": ("--lora.alpha", "64"),
    "lora.dropout": ("--lora.dropout", "0.5"),
    "lora.targets": ("--lora.targets", "q_proj,v_proj"),
    "lora.rslora": ("--lora.rslora", "true"),
    "lora.dora": ("--lora.dora", "true"),
    "lora.modules_to_save": ("--lora.modules_to_save", "lm_head"),
    "data.train": ("--data.train", MOVED),
    "data.train[].path": ("--data.train", "{spelled}"),
    "data.train[].format": ("--data.train", '[{"path": "{rows}", "format": "messages"}]'),
    "data.train[].columns": ("--data.train", '[{"path": "{rows}", "columns": {"of_other_sets": "prompt"}}]'),
    "data.train[].split": ("--data.train", '[{"path": "{splits}", "split": "test"}]'),
    "data.train[].limit": ("--data.train", '[{"path": "{rows}", "limit": 9}]'),
    "data.eval_fraction": ("--data.eval_fraction", "0.3"),
    "data.max_length_tokens": ("--data.max_length_tokens", "200"),
    "data.pack_tokens": ("--data.packing", "best_fit", "--data.pack_tokens", "300"),
    "data.packing": ("--data.packing", "best_fit"),
    "data.overlong": ("--data.overlong", "truncate"),
    "data.thinking": ("--data.thinking", "last"),
    "data.train_turns": ("--data.train_turns", "last"),
    "data.weighting": ("--data.weighting", "sample"),
    "data.chat_template": ("--data.chat_template", SAME_TEMPLATE),
    "data.workers": ("--data.workers", "2"),
    "data.cache_dir": ("--data.cache_dir", "{elsewhere}"),
    "data.stream_window_mib": ("--data.stream_window_mib", "4", "--data.eval_fraction", "0", "--train.eval_every_steps", "null", "--train.epochs", "1", "--train.max_steps", "9"),
    "data.max_bad_fraction": ("--data.max_bad_fraction", "0.5"),
    "optim.type": ("--optim.type", "sgd"),
    "optim.learning_rate": ("--optim.learning_rate", "3e-2"),
    "optim.betas": ("--optim.betas", "0.5,0.6"),
    "optim.eps": ("--optim.eps", "1e-3"),
    "optim.weight_decay": ("--optim.weight_decay", "0.9"),
    "optim.schedule": ("--optim.schedule", "linear"),
    "optim.warmup_ratio": ("--optim.warmup_steps", "null", "--optim.warmup_ratio", "0.9"),
    "optim.warmup_steps": ("--optim.warmup_steps", "20"),
    "optim.min_lr_ratio": ("--optim.min_lr_ratio", "0.7"),
    "optim.max_grad_norm": ("--optim.max_grad_norm", "0.01"),
    "train.epochs": ("--train.epochs", "3"),
    "train.max_steps": ("--train.max_steps", "7"),
    "train.gradient_accumulation_steps": ("--train.gradient_accumulation_steps", "1"),
    "train.recompute": ("--train.recompute", "full"),
    "train.offload_host_gib": ("--train.offload_host_gib", "0.1"),
    "train.offload_disk": ("--train.offload_disk", "{nvme}"),
    "train.kv_heads_at_a_time": ("--train.recompute", "full", "--train.kv_heads_at_a_time", "1"),
    "train.recompute_every": ("--train.recompute", "every_k", "--train.recompute_every", "1"),
    "train.verify_first": ("--train.verify_first", "true"),
    "train.eval_every_steps": ("--train.eval_every_steps", "1"),
    "train.save_every_steps": ("--train.save_every_steps", "1"),
    "train.keep_checkpoints": ("--train.keep_checkpoints", "5"),
    "train.resume": ("--train.resume", "6"),
    "train.deterministic": ("--train.deterministic", "true"),
    "train.max_minutes": ("--train.max_minutes", "600"),
    "train.on_nonfinite": ("--train.on_nonfinite", "skip"),
    "train.max_skipped_in_a_row": ("--train.on_nonfinite", "skip", "--train.max_skipped_in_a_row", "5"),
    "train.hang_minutes": ("--train.hang_minutes", "20"),
    "log.trackers": ("--log.trackers", "wandb", "--log.wandb", "offline"),
    "log.wandb": ("--log.wandb", "offline"),
    "log.project": ("--log.wandb", "offline", "--log.project", "other"),
    "log.name": ("--log.wandb", "offline", "--log.name", "other"),
}  # fmt: skip
CHANGED_ROWS = {"data.train[].limit"}  # leads to other rows; other keys known by content lead to the same
NOT_SEEN = {"train.on_nonfinite", "train.max_skipped_in_a_row"}  # in the losses of a run that stays finite
OF_MIXTURES = {"lora.experts", "train.router_aux_loss", "train.router_z_loss"}
OF_HUB_SETS = {"data.train[].subset", "data.train[].revision"}
ELSEWHERE = (
    {key for key in CLASSES if key.startswith("dpo.")}
    | {
        "data.eval",
        "model.revision",
        "lora.init_from",
        "train.mlp_tile_tokens",
        "optim.adam_learning_rate",
        "hub.repo",
        "hub.push_every_save",
        "hub.private",
    }
    | OF_HUB_SETS
    | OF_MIXTURES
)
"""`dpo.*`, `lora.init_from`, mixtures: below, without a run. `train.mlp_tile_tokens`: below, with a run without dropout. `optim.adam_learning_rate` is
Muon's. `data.eval` excludes
`data.eval_fraction`, which decides the training rows. What names a version on the hub is refused for files and folders. `hub.*`: `tests/e2e/test_hub.py`."""

QUICK = {
    "lora.alpha", "lora.dropout", "model.rope.type", "optim.weight_decay", "data.train", "data.train[].limit", "train.recompute",
}  # fmt: skip


def test_every_key_has_a_class_and_another_value() -> None:
    assert set(OTHERS) | ELSEWHERE == set(CLASSES)


def steps_of(output: Path) -> list[tuple[Any, ...]]:
    return [record for record in trace(output) if record[1] != "eval"]


def written(job: Path, folder: Path, words: tuple[str, ...]) -> list[str]:
    """The command line with its places filled in."""
    moved = folder / "moved" / "other name.jsonl"
    moved.parent.mkdir()
    shutil.copyfile(job.parent / "rows.jsonl", moved)
    os.utime(moved, (1, 1))
    (folder / "splits").mkdir()
    (folder / "nvme").mkdir()
    shutil.copyfile(job.parent / "rows.jsonl", folder / "splits" / "test.jsonl")
    (folder / "splits" / "train.jsonl").write_text("{}\n")
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "zero2.json").write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 2}}))
    places = {
        "{moved}": moved, "{spelled}": job.parent / "." / ".." / job.parent.name / "rows.jsonl", "{rows}": job.parent / "rows.jsonl", "{splits}": folder / "splits",
        "{pairs}": job.parent / "pairs.jsonl", "{template}": folder / "template.jinja", "{stage2}": folder / "zero2.json",
        "{elsewhere}": folder / "cache", "{nvme}": folder / "nvme", "{model}": shutil.copytree(job.parent / "model", folder / "model"),
    }  # fmt: skip
    filled = []
    for word in words:
        for name, place in places.items():
            word = word.replace(name, str(place))  # noqa: PLW2901
        filled.append(word)
    return filled


@pytest.mark.parametrize("key", [key if key in QUICK else pytest.param(key, marks=pytest.mark.slow) for key in OTHERS])
def test_another_value(launcher: Launcher, golden: Path, tmp_path: Path, key: str) -> None:
    output = Path(shutil.copytree(golden, tmp_path / "another place" / "out"))
    shutil.rmtree(output / "checkpoint-8")
    before, kind = checkpoints(output), CLASSES[key]
    codes, run = launcher.run(output, *written(launcher.config, tmp_path, OTHERS[key]), timeout_s=120)
    said = run.text(0)
    if kind is OnResume.REFUSED or key in CHANGED_ROWS or key == "ds_config":
        assert codes == [64, 64], run.text()
        assert "cannot be continued exactly" in said
        assert checkpoints(output) == before
        assert trace(output) == trace(golden), "the records are as they were"
        if key in CHANGED_ROWS:
            assert "the training rows are others" in said
        else:
            name = "zero_optimization.stage in ds_config" if key == "ds_config" else key
            assert f"{name} was " in said
            assert " now" in said.partition(f"{name} was ")[2].partition(";")[0]
        return
    assert codes == [0, 0], run.text()
    assert "resumed from" in said
    ours, theirs = steps_of(output), steps_of(golden)
    assert ours[:6] == theirs[:6]
    changes = json.loads((output / "changes.json").read_text()) if (output / "changes.json").exists() else []
    if kind in (OnResume.APPLIED, OnResume.ROUNDING):
        assert (key, 6) in [(change["key"], change["after_step"]) for change in changes]
        assert f"{key} was " in said
    else:
        assert changes == []
    if kind is OnResume.APPLIED and key not in NOT_SEEN:
        assert ours[6:8] != theirs[6:8], "the new value is in force"
    elif kind is OnResume.ROUNDING:
        for mine, other in zip(ours, theirs, strict=True):
            if key == "sp":
                continue  # each rank draws its own dropout; without dropout: test_resume.py
            assert mine == pytest.approx(other, rel=1e-5)
    else:
        assert ours == theirs, "bit for bit"


@pytest.mark.slow
def test_tiles_are_equal_to_rounding(launcher: Launcher, tmp_path: Path) -> None:
    """Adapters with dropout, as the job has them, are not tiled."""
    output, plain = tmp_path / "out", ("--lora.dropout", "0")
    codes, run = launcher.run(output, *plain, timeout_s=120)
    assert codes == [0, 0], run.text()
    before = steps_of(output)
    shutil.rmtree(output / "checkpoint-8")
    codes, run = launcher.run(output, *plain, "--train.mlp_tile_tokens", "16", timeout_s=120)
    assert codes == [0, 0], run.text()
    (change,) = json.loads((output / "changes.json").read_text())
    assert (change["key"], change["after_step"], change["now"]) == ("train.mlp_tile_tokens", 6, 16)
    for mine, other in zip(steps_of(output), before, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def state_of(config: RunConfig) -> TrainState:
    layout: Any = SimpleNamespace(dp=1)
    return TrainState(
        step=6, epoch=1, step_in_epoch=2, tokens_seen=1, total_steps=8, world=2, rows="rows", order="order", trained="t",
        decides=what_decides(config, {"zero_optimization": {"stage": 3}}, layout), may_change=what_may_change(config), model={},
    )  # fmt: skip


DPO = ["--objective", "dpo", "--lora.dropout", "0"]
OTHERS_OF_PAIRS = {
    "dpo.beta": ["0.3"], "dpo.loss": ["ipo"], "dpo.label_smoothing": ["0.1"], "dpo.rpo_alpha": ["1.0"],
    "dpo.simpo_gamma": ["0.7"], "dpo.reference": ["precomputed"], "dpo.passes": ["two"],
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(OTHERS_OF_PAIRS))
def test_another_value_in_preference_training(key: str) -> None:
    assert set(OTHERS_OF_PAIRS) == {f"dpo.{name}" for name in DpoConfig.model_fields}
    loss = ["--dpo.loss", "simpo"] if key == "dpo.simpo_gamma" else []
    before = state_of(load_run_config([*DPO, *loss]))
    now = state_of(load_run_config([*DPO, *loss, f"--{key}", *OTHERS_OF_PAIRS[key]]))
    if CLASSES[key] is OnResume.REFUSED:
        with pytest.raises(CheckpointError, match=f"{key} was .* and is .* now"):
            refuse_another_run(Path("checkpoint-6"), before, now)
    else:
        refuse_another_run(Path("checkpoint-6"), before, now)
        (change,) = changes_since(before, now)
        assert (change["key"], change["after_step"]) == (key, 6)


@pytest.mark.parametrize("key", sorted(OF_MIXTURES))
def test_another_value_in_training_a_mixture(key: str) -> None:
    words = (f"--{key}", "true" if key == "lora.experts" else "0.01")
    assert CLASSES[key] is OnResume.REFUSED
    with pytest.raises(CheckpointError, match=f"{key} was .* and is .* now"):
        refuse_another_run(Path("checkpoint-6"), state_of(load_run_config([])), state_of(load_run_config([*words])))


def test_another_adapter_to_start_from_is_refused() -> None:
    before, now = state_of(load_run_config([])), state_of(load_run_config(["--lora.init_from", "elsewhere"]))
    with pytest.raises(CheckpointError, match=r"lora.init_from was null and is .*elsewhere.* now"):
        refuse_another_run(Path("checkpoint-6"), before, now)


def test_spellings_of_one_value_are_one() -> None:
    """What `auto` became, the budget that follows from the length, and packs over ranks or over micro-steps."""
    plain, said = load_run_config([]), load_run_config(["--data.pack_tokens", "128K", "--model.dtype", "fp32"])
    refuse_another_run(Path("checkpoint-6"), state_of(plain), state_of(said))
    four: Any = SimpleNamespace(dp=4)
    accumulated = load_run_config(["--train.gradient_accumulation_steps", "4"])
    over_ranks = replace(state_of(plain), decides=what_decides(plain, {"zero_optimization": {"stage": 3}}, four))
    refuse_another_run(Path("checkpoint-6"), state_of(accumulated), over_ranks)


def test_keys_that_only_one_version_knows() -> None:
    """A key that came later did before what its default does; one that is gone decided something that cannot be had."""
    state = state_of(load_run_config([]))

    def without(key: str) -> TrainState:
        return replace(state, decides={k: v for k, v in state.decides.items() if k != key})

    for key in ("lora.dora", "seed"):
        refuse_another_run(Path("checkpoint-6"), without(key), state)
    now = state_of(load_run_config(["--lora.dora", "true"]))
    with pytest.raises(CheckpointError, match=r"lora.dora was false and is true now"):
        refuse_another_run(Path("checkpoint-6"), without("lora.dora"), now)
    with pytest.raises(CheckpointError, match=r"lora.moon was full and is unknown to this version now"):
        refuse_another_run(Path("checkpoint-6"), replace(state, decides=state.decides | {"lora.moon": "full"}), state)
    may = {k: v for k, v in state.may_change.items() if k != "optim.eps"}
    other = state_of(load_run_config(["--optim.eps", "1e-3"]))
    assert changes_since(replace(state, may_change=may), state) == []
    (change,) = changes_since(replace(state, may_change=may), other)
    assert (change["key"], change["was"], change["now"]) == ("optim.eps", 1e-8, 1e-3)


def test_a_line_removed_from_a_models_config_is_seen() -> None:
    """What is not in it is the default of the family, which is the same as long as the software is."""
    model = {"rms_norm_eps": 1e-5, "transformers_version": "5.24.0"}
    before = replace(state_of(load_run_config([])), model=model)
    now = replace(before, model={"transformers_version": "5.24.0"})
    with pytest.raises(CheckpointError, match=r"rms_norm_eps in config.json was 1e-05 and is the default now"):
        refuse_another_run(Path("checkpoint-6"), before, now)
    refuse_another_run(Path("checkpoint-6"), before, replace(now, model={"transformers_version": "5.25.0"}))


def test_another_norm_of_the_same_weights_is_refused() -> None:
    """The weights may be equal and the model another one: its config.json decides too."""
    state = replace(state_of(load_run_config([])), model={"rms_norm_eps": 1e-6})
    with pytest.raises(CheckpointError, match=r"model.path: rms_norm_eps in config.json was 1e-06 and is 1e-05 now"):
        refuse_another_run(Path("checkpoint-6"), state, replace(state, model={"rms_norm_eps": 1e-5}))


def test_what_a_models_config_says_survives_being_written_down() -> None:
    """Tuples and numbers as keys come back from JSON as lists and text: they are compared as they come back."""
    config = LlamaConfig(hidden_size=64, rms_norm_eps=1e-5, id2label={0: "a", 1: "b", 2: "c"}, own=(1, 2))
    model = what_the_model_is(config)
    assert model["rms_norm_eps"] == 1e-5
    assert json.loads(json.dumps(model)) == model
    assert not {"architectures", "_name_or_path"} & set(model)


def test_an_edited_answer_is_seen_though_size_and_time_were_kept(
    launcher: Launcher, golden: Path, tmp_path: Path
) -> None:
    """As `rsync -t` of another version does."""
    output = Path(shutil.copytree(golden, tmp_path / "out"))
    rows = tmp_path / "rows.jsonl"
    shutil.copy2(launcher.config.parent / "rows.jsonl", rows)
    shutil.rmtree(output / "checkpoint-8")
    codes, run = launcher.run(output, "--data.train", str(rows))
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)
    shutil.rmtree(output / "checkpoint-8")
    kept = rows.stat()
    time.sleep(0.05)
    rows.write_text(rows.read_text().replace("It is 10.", "It is 11."))
    os.utime(rows, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert rows.stat().st_size == kept.st_size
    codes, run = launcher.run(output, "--data.train", str(rows))
    assert codes == [64, 64], run.text()
    assert "the training rows are others" in run.text(0)


def test_a_config_that_was_resumed_says_so_in_its_folder(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    """Changes of several starts add up, each with the step it counts from."""
    output = Path(shutil.copytree(golden, tmp_path / "out"))
    rate = ("--optim.learning_rate", "2e-2")
    for step, keys in ((6, rate), (7, (*rate, "--optim.eps", "1e-6"))):
        codes, run = launcher.run(output, *keys, "--train.resume", str(step), "--train.save_every_steps", "1")
        assert codes == [0, 0], run.text()
    assert [(c["key"], c["after_step"]) for c in json.loads((output / "changes.json").read_text())] == [
        ("optim.learning_rate", 6),
        ("optim.eps", 7),
    ]
    assert yaml.safe_load((output / "config.yaml").read_text())["optim"]["eps"] == 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("key", ["optim.max_grad_norm", "optim.weight_decay"])
def test_new_settings_are_in_force_at_every_stage(launcher: Launcher, tmp_path: Path, stage: int, key: str) -> None:
    """DeepSpeed's stages 1 and 2 bring the checkpoint's clipping with them, all of them its decay."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": stage}}))
    output = tmp_path / "out"
    codes, run = launcher.run(output, "--ds_config", str(path))
    assert codes == [0, 0], run.text()
    before = steps_of(output)
    shutil.rmtree(output / "checkpoint-8")
    codes, run = launcher.run(output, "--ds_config", str(path), *OTHERS[key])
    assert codes == [0, 0], run.text()
    now = steps_of(output)
    assert now[:6] == before[:6]
    assert now[7] != before[7]
