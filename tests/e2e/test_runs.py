"""Whole runs from the command line to the files a user takes away."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_longft.cli import main as cli
from tests.distributed.pool import free_port
from tests.e2e.conftest import start
from tests.faults.ranks import Launcher, trace


def losses(output: Path) -> list[float]:
    """Of each step."""
    return [r["loss"] for r in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def logits(model: Any, folder: Path) -> torch.Tensor:
    """Of a fixed text."""
    tokens = AutoTokenizer.from_pretrained(folder)("def times(a, b): what is 3 times 6?", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(tokens).logits


def code_of_card(output: Path) -> str:
    """The Python of the model card."""
    return re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), re.DOTALL)[1]  # type: ignore[index]


def test_console_and_files_of_a_run(sp2: tuple[Path, str]) -> None:
    output, console = sp2
    assert len(re.findall(r"^\d\d:\d\d:\d\d step \d/6  loss \d", console, re.MULTILINE)) == 6
    assert "held-out loss at step 0" in console
    assert "training loss, first 2 -> last 2 steps" in console
    assert "Next: ds-longft export" in console
    assert "Warning" not in console, console
    names = {path.name for path in output.iterdir()}
    expected = (
        "adapter_config.json adapter_model.safetensors base_config tokenizer.json chat_template.jinja config.yaml"
    )
    assert {*expected.split(), "ds_config.json", "versions.json", "metrics.jsonl", "loss.png", "README.md"} <= names
    assert {"checkpoint-2", "checkpoint-4", "checkpoint-6", "wandb"} <= names
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_start_up_is_told_by_phase(sp2: tuple[Path, str]) -> None:
    """On the console and in the status; the phases are all of it, none is left out."""
    output, console = sp2
    phases = json.loads((output / "run_status.json").read_text())["start_up_s"]
    named = ["checks and imports", "processes joined", "data tokenised", "model loaded", "engine built", "ready"]
    assert list(phases) == named
    total, parts = re.search(r"^start-up ([\d.]+) s: (.*)$", console, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert sum(phases.values()) == pytest.approx(float(total), abs=0.2)
    assert parts == ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())


def test_loss_falls(sp2: tuple[Path, str]) -> None:
    output, _ = sp2
    held_out = [row[2] for row in trace(output) if row[1] == "eval"]
    assert losses(output)[-1] < 0.9 * losses(output)[0]
    assert held_out[-1] < 0.9 * held_out[0]


def test_a_resumed_run_is_the_uninterrupted_one(sp2: tuple[Path, str], ranks: Launcher, tmp_path: Path) -> None:
    """From the middle of the first epoch, over its end; the wandb run is the same one."""
    whole, _ = sp2
    output = tmp_path / "out"
    output.mkdir()
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", output)
    codes, run = ranks.run(output, "--sp", "2", "--log.wandb", "offline", env={"WANDB_SILENT": "true"}, timeout_s=120.0)
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(whole)
    before, after = (next(p.glob("wandb/offline-run-*")).name.rpartition("-")[2] for p in (whole, output))
    assert before == after
    assert (output / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_one_plain_process_gives_the_same_losses(sp2: tuple[Path, str], job: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = start("python", "launch/train.py", "--config", str(job), "--output_dir", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(output) == pytest.approx(losses(sp2[0]), rel=1e-5)


def test_the_saved_config_runs_the_same_training_again(sp2: tuple[Path, str], ranks: Launcher, tmp_path: Path) -> None:
    saved = str(sp2[0] / "config.yaml")
    codes, run = ranks.run(
        tmp_path / "out", "--config", saved, "--log.wandb", "off", "--train.save_every_steps", "null"
    )
    assert codes == [0, 0], run.text()
    assert trace(tmp_path / "out") == trace(sp2[0])


def test_plain_peft_loads_the_adapter(sp2: tuple[Path, str]) -> None:
    """As the model card says; the answers change."""
    output, _ = sp2
    names: dict[str, Any] = {}
    exec(code_of_card(output), names)
    adapted = logits(names["model"], output)
    with names["model"].disable_adapter():
        plain = logits(names["model"], output)
    assert (adapted - plain).abs().max() > 0.1


def test_export_merges(sp2: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, _ = sp2
    assert cli(["export", str(output), str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "merged adapter"
    names: dict[str, Any] = {}
    exec(code_of_card(output), names)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(merged, tmp_path / "merged"), logits(names["model"], output), rtol=1e-4, atol=1e-4
    )
    assert not isinstance(merged, PeftModel)


def test_a_base_model_is_saved_with_the_template_it_learnt(job: Path, ranks: Launcher, tmp_path: Path) -> None:
    base = Path(shutil.copytree(job.parent / "model", tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(base)
    stop, tokenizer.eos_token = tokenizer.eos_token_id, "<|endoftext|>"  # as base models have it
    tokenizer.save_pretrained(base)
    for name in ("config.json", "generation_config.json"):
        facts = json.loads((base / name).read_text()) | {"eos_token_id": tokenizer.eos_token_id}
        (base / name).write_text(json.dumps(facts))
    keys = ["--model.path", str(base), "--data.chat_template", "qwen3_thinking.jinja", "--train.max_steps", "1"]
    codes, run = ranks.run(tmp_path / "out", *keys, world=1)
    assert codes == [0], run.text()
    asked = [{"role": "user", "content": "Q?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
    assert "generation %}" not in tokenizer.chat_template
    # it stops where it is served
    assert tokenizer.eos_token_id == stop
    assert "ends an answer with '<|im_end|>'" in run.text()
    cli(["export", str(tmp_path / "out"), str(tmp_path / "merged")])
    served = json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"]
    assert served == [tokenizer.convert_tokens_to_ids("<|endoftext|>"), stop]

    # the run is finished: other settings train nothing, and are not written down as if they had
    records = {name: (tmp_path / "out" / name).read_bytes() for name in ("config.yaml", "README.md", "metrics.jsonl")}
    codes, run = ranks.run(tmp_path / "out", *keys, "--optim.learning_rate", "0.7", world=1)
    assert codes == [0], run.text()
    assert "is finished: it has all 1 steps" in run.text()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in records} == records


def test_full_fine_tuning_of_uneven_heads_under_torchrun(job: Path, ranks: Launcher, tmp_path: Path) -> None:
    """9 query and 3 kv heads on two ranks; the result is an ordinary folder, and the losses are one process's."""
    keys = ["--model.path", str(job.parent / "model-9-heads"), "--lora", "null", "--train.max_steps", "3"]
    output = tmp_path / "two"
    done = start(
        "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "launch/train.py", "--config", str(job),
        "--output_dir", str(output), *keys,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    codes, run = ranks.run(tmp_path / "one", *keys, world=1)
    assert codes == [0], run.text()
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    names: dict[str, Any] = {}
    exec(code_of_card(output), names)
    base = AutoModelForCausalLM.from_pretrained(job.parent / "model-9-heads")
    assert type(names["model"]) is type(base)
    assert (logits(names["model"], output) - logits(base, output)).abs().max() > 0.1


def test_the_card_of_a_stretched_model_loads_the_stretch(job: Path, ranks: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    keys = ["--model.rope.type", "yarn", "--data.max_length_tokens", "512", "--train.max_steps", "1"]
    codes, run = ranks.run(output, *keys)
    assert codes == [0, 0], run.text()
    names: dict[str, Any] = {}
    exec(code_of_card(output), names)
    assert names["model"].config.rope_parameters["rope_type"] == "yarn"
    assert names["model"].config.max_position_embeddings == 512


def test_another_start_in_the_same_folder_does_not_mix_its_records(ranks: Launcher, tmp_path: Path) -> None:
    keys = ["--train.resume", "never", "--train.max_steps", "1", "--train.eval_every_steps", "null"]
    for _ in range(2):
        codes, run = ranks.run(tmp_path / "out", *keys)
        assert codes == [0, 0], run.text()
    assert next(row[:2] for row in trace(tmp_path / "out")) == (0, "eval")
    assert len(trace(tmp_path / "out")) == 3
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["train"]["max_steps"] == 1


@pytest.mark.slow
def test_dora_goes_on_under_zero3(ranks: Launcher, tmp_path: Path) -> None:
    """PEFT's DoRA reads A and B without calling them: after a resume ZeRO-3 had not gathered them."""
    keys = ["--lora.dora", "true", "--ds_config", "ds_configs/zero3_sp.json"]
    whole, output = tmp_path / "whole", tmp_path / "out"
    codes, run = ranks.run(whole, *keys, world=1, timeout_s=120.0)
    assert codes == [0], run.text()
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", output)
    codes, run = ranks.run(output, *keys, world=1, timeout_s=120.0)
    assert codes == [0], run.text()
    assert trace(output) == trace(whole)
