"""A run that adds tokens: from the command line to files that plain PEFT and transformers open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_longft.cli import main as cli
from ds_longft.config.read import load_run_config
from ds_longft.errors import ConfigError
from tests.e2e.job import write_job
from tests.e2e.test_runs import code_of_card, losses
from tests.faults.ranks import Launcher

pytestmark = pytest.mark.timeout(900)
TOKENS = ["<|find|>", "<|done|>"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job with the tokens in its answers."""
    path = write_job(tmp_path_factory.mktemp("tokens"))
    for file in (path.parent / "train.jsonl", path.parent / "eval.jsonl"):
        file.write_text(file.read_text().replace("It is ", "<|find|>").replace('."}]', '<|done|>"}]'))
    run: dict[str, Any] = yaml.safe_load(path.read_text())
    run["model"]["add_tokens"] = TOKENS
    run["ds_config"] = "ds_configs/zero3_sp.json"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture(scope="module")
def ranks(job: Path) -> Iterator[Launcher]:
    launcher = Launcher(job)
    yield launcher
    launcher.close()


def test_from_training_to_what_opens_elsewhere(job: Path, ranks: Launcher, tmp_path: Path) -> None:
    output, again = tmp_path / "out", tmp_path / "again"
    codes, run = ranks.run(output, "--sp", "2", timeout_s=240.0)
    assert codes == [0, 0], run.text()
    again.mkdir()
    shutil.copytree(output / "checkpoint-4", again / "checkpoint-4")
    shutil.copy(output / "metrics.jsonl", again)
    codes, run = ranks.run(again, "--sp", "2", timeout_s=240.0)
    assert codes == [0, 0], run.text()
    adapter = load_file(output / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in adapter.items() if "trainable_tokens" in name}
    assert [tuple(t.shape) for t in rows.values()] == [(2, 32), (2, 32)]
    for name, tensor in load_file(again / "adapter_model.safetensors").items():
        assert torch.equal(tensor, adapter[name])
    assert losses(again) == losses(output)

    assert cli(["export", str(output), str(tmp_path / "merged")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(job.parent / "model").get_input_embeddings().weight
    new = tokenizer.convert_tokens_to_ids(TOKENS)
    assert merged.get_input_embeddings().weight.shape[0] == len(tokenizer) == base.shape[0] + 2 == max(new) + 1
    assert not torch.allclose(merged.get_input_embeddings().weight[new], base.mean(0), atol=1e-3)  # they were trained
    ids = tokenizer("<|find|>4<|done|>", return_tensors="pt").input_ids
    scope: dict[str, Any] = {}
    exec(code_of_card(output), scope)
    assert isinstance(scope["model"], PeftModel)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(ids).logits, merged.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_frozen_rows_stay_the_mean(job: Path, ranks: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    keys = ("--sp", "1", "--model.train_added", "false", "--train.max_steps", "1")
    codes, run = ranks.run(output, *keys, world=1, timeout_s=240.0)
    assert codes == [0], run.text()
    assert not [name for name in load_file(output / "adapter_model.safetensors") if "trainable_tokens" in name]
    assert cli(["export", str(output), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").get_input_embeddings().weight
    base = AutoModelForCausalLM.from_pretrained(job.parent / "model").get_input_embeddings().weight
    torch.testing.assert_close(merged[-2:], base.mean(0).expand(2, -1))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"train_added": False}}, "model.add_tokens is empty"),
        ({"model": {"add_tokens": ["<a>", "<a>"]}}, "there twice"),
        ({"model": {"add_tokens": ["<a>"], "train_added": False}, "lora": None}, "trains every row"),
        (
            {"model": {"add_tokens": ["<a>"]}, "lora": {"targets": ["q_proj", "lm_head"]}},
            "lora.modules_to_save instead",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(changes))
    with pytest.raises(ConfigError, match=says):
        load_run_config(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    "head",
    ["own head", "tied", *(pytest.param(case, marks=pytest.mark.slow) for case in ("saved whole", "all weights"))],
)
def test_zero3_trains_the_same(job: Path, ranks: Launcher, tmp_path: Path, head: str) -> None:
    """As stage 2 does: losses, and what is saved. By SGD, as Adam makes much of the rounding of a gradient near zero."""
    outputs, keys = (
        [tmp_path / "zero2", tmp_path / "zero3"],
        ["--sp", "2", "--train.max_steps", "3", "--optim.type", "sgd"],
    )
    if head == "tied":
        model = Path(shutil.copytree(job.parent / "model", tmp_path / "tied"))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        weights = load_file(model / "model.safetensors")
        save_file(
            {k: v for k, v in weights.items() if "lm_head" not in k}, model / "model.safetensors", {"format": "pt"}
        )
        keys += ["--model.path", str(model)]
    keys += {"saved whole": ["--lora.modules_to_save", "lm_head"], "all weights": ["--lora", "null"]}.get(head, [])
    name = "model" if head == "all weights" else "adapter_model"
    for output in outputs:
        codes, run = ranks.run(output, *keys, "--ds_config", f"ds_configs/{output.name}_sp.json", timeout_s=240.0)
        assert codes == [0, 0], run.text()
    assert losses(outputs[1]) == pytest.approx(losses(outputs[0]), rel=1e-6)
    two, three = (load_file(output / f"{name}.safetensors") for output in outputs)
    assert two.keys() == three.keys()
    trained = {"own head": 2, "tied": 1, "saved whole": 1, "all weights": 0}
    assert sum("trainable_tokens" in tensor for tensor in three) == trained[head]
    for tensor in three:
        torch.testing.assert_close(three[tensor], two[tensor], rtol=1e-5, atol=1e-7)
