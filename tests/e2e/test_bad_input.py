"""Mistakes end with exit code 64 and one message that names the key, before a weight is read: the model's file is broken
here, so a run that came as far as loading it would complain about that instead.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds_longft.errors import EXIT_CONFIG
from tests.e2e.conftest import start
from tests.e2e.job import write_job
from tests.faults.ranks import Launcher


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts runs of a job that has everything a mistake needs, and no readable weights."""
    folder = tmp_path_factory.mktemp("broken")
    config = write_job(folder)
    (folder / "model" / "model.safetensors").write_bytes(b"not weights")
    (folder / "empty.jsonl").write_text("\n")
    (folder / "types.jsonl").write_text('{"messages": "hello"}\n{"messages": [{"role": "user", "content": 5}]}\n')
    (folder / "columns.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    (folder / "half.json").write_text('{"zero_optimization": {"stage": 3,}}')
    (folder / "stage.json").write_text('{"zero_optimization": {"stage": "three"}, "fp16": {"enabled": true}}')
    (folder / "bucket.json").write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}')
    offload = {"device": "cpu", "buffer_count": -1}
    (folder / "offload.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": offload}}))
    (folder / "deep.json").write_text(100_000 * "[")
    (folder / "deep.yaml").write_text("data: " + 100_000 * "[")
    shutil.copytree(folder / "model", folder / "unmarked")
    # It writes the answers in capitals: what is trained can neither be read off marks nor found again in the text.
    template = "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}<|im_end|>{% endfor %}"
    (folder / "unmarked" / "chat_template.jinja").write_text(template)
    launcher = Launcher(config)
    yield launcher
    launcher.close()


CASES = {
    "missing data": (["--data.train", "{job}/nowhere.jsonl"], ["data.train", "nowhere.jsonl"]),
    "missing model": (["--model.path", "{job}/nowhere"], ["model.path", "nowhere"]),
    "unknown key": (["--data.max_lenght_tokens", "64"], ["data.max_lenght_tokens", "did you mean data.max_length_tokens"]),
    "another trainer's key": (["--per_device_train_batch_size", "4"], ["data.pack_tokens", "gradient_accumulation_steps"]),
    "sp does not divide": (["--sp", "2"], ["sp is 2", "does not divide", "ranks: 1"]),
    "too long": (["--data.max_length_tokens", "1K"], ["data.max_length_tokens is 1024", "window is 256", "model.rope.type"]),
    "wrong type": (["--train.epochs", "many"], ["train.epochs", "'many'", "a number above 0"]),
    "wrong type in the file's rows": (["--data.train", "{job}/types.jsonl"], ["none of the 2 rows of data.train", "ledger.jsonl", "messages"]),
    "unknown columns": (["--data.train", "{job}/columns.jsonl"], ["question, reply", "Expected one of"]),
    "empty data": (["--data.train", "{job}/empty.jsonl"], ["empty.jsonl (data.train", "no readable row"]),
    "no marks": (["--model.path", "{job}/unmarked"], ["data.chat_template", "{% generation %}"]),
    "missing JSON": (["--ds_config", "nowhere.json"], ["ds_config", "nowhere.json"]),
    "broken JSON": (["--ds_config", "{job}/half.json"], ["half.json is not valid JSON", "line 1"]),
    "wrong types in the JSON": (["--ds_config", "{job}/stage.json"], ['zero_optimization.stage is "three"', "fp16"]),
    "a size below zero in the JSON": (["--ds_config", "{job}/bucket.json"], ["zero_optimization.reduce_bucket_size is -1"]),
    "a value only DeepSpeed judges": (["--ds_config", "{job}/offload.json"], ["zero_optimization.offload_optimizer.buffer_count is -1"]),
    "a JSON too deep": (["--ds_config", "{job}/deep.json"], ["ds_config", "deep.json", "nested too deeply"]),
    "a YAML too deep": (["--config", "{job}/deep.yaml"], ["deep.yaml", "nested too deeply"]),
    "unknown kernel": (["--model.kernel", "flashy"], ["model.kernel", "'flashy'", "auto"]),
    "kernel of another machine": (["--model.kernel", "cudnn"], ["model.kernel is cudnn", "cpu"]),
    "a wrong value, a rule across keys, a file": (
        ["--lora.r", "0", "--data.eval_fraction", "0.1", "--data.eval", "{job}/rows.jsonl", "--data.train", "{job}/nowhere.jsonl", "--sp", "2"],
        ["lora.r", "data.eval_fraction", "nowhere.jsonl", "sp is 2"],
    ),
    "missing recipe": (["--config", "nowhere.yaml"], ["cannot read nowhere.yaml"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_message(case: str, broken: Launcher, tmp_path: Path) -> None:
    keys, said = CASES[case]
    folder = broken.config.parent
    began = time.monotonic()
    codes, run = broken.run(tmp_path / "out", *(key.replace("{job}", str(folder)) for key in keys), world=1)
    assert codes == [EXIT_CONFIG], run.text()
    assert [words for words in said if words not in run.text()] == [], run.text()
    assert "Traceback" not in run.text()
    assert time.monotonic() - began < 30


def test_all_mistakes_at_once_and_once(broken: Launcher, tmp_path: Path) -> None:
    """Two ranks, three mistakes: one message with all of them."""
    keys = ["--sp", "3", "--data.train", "nowhere.jsonl", "--ds_config", "nowhere.json"]
    codes, run = broken.run(tmp_path / "out", *keys)
    assert codes == [EXIT_CONFIG, EXIT_CONFIG]
    assert run.text().count("3 problems in the configuration") == 1, run.text()
    assert not (tmp_path / "out").exists()


def test_data_mistakes_are_found_on_every_rank(broken: Launcher, tmp_path: Path) -> None:
    """Found by rank 0 alone, after the ranks have joined: nobody is left waiting, and the status says why."""
    codes, run = broken.run(tmp_path / "out", "--data.train", str(broken.config.parent / "empty.jsonl"))
    assert codes == [EXIT_CONFIG, EXIT_CONFIG], run.text()
    status = json.loads((tmp_path / "out" / "run_status.json").read_text())
    assert status["exit_code"] == EXIT_CONFIG
    assert "no readable row" in status["error"]


def test_a_mistake_costs_a_second(broken: Launcher) -> None:
    """The real program, from the shell: refused without importing torch."""
    began = time.monotonic()
    done = start("python", "launch/train.py", "--config", str(broken.config), "--train.epochs", "0")
    assert done.returncode == EXIT_CONFIG
    assert "train.epochs: seen '0', expected a number above 0" in done.stderr, done.stderr
    assert time.monotonic() - began < 20
