"""A result on a hub: one commit with adapter or model, card and report; the token stays in the environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import start
from tests.hub import TOKEN, Hub

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


def environment(hub: Hub, home: Path, token: str = TOKEN) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip


@pytest.fixture(scope="module")
def output(hub: Hub, job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    done = start(
        "python", "launch/train.py", "--config", str(job), "--output_dir", str(folder / "out"), "--sp", "1",
        "--hub.repo", "me/mine", "--hub.push_every_save", "true", **environment(hub, folder / "home"),
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "uploaded out: " in text
    assert TOKEN not in text
    return folder / "out"


def fetched(hub: Hub, repo: str, folder: Path) -> Path:
    for name, content in hub.repos[repo].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_run_uploads_its_checkpoints_and_its_result(hub: Hub, output: Path, job: Path, tmp_path: Path) -> None:
    assert hub.private["me/mine"]
    assert hub.messages[0].startswith("checkpoint-")
    assert hub.messages[-1] == "result of the run"
    files = hub.repos["me/mine"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json", "loss.png"} <= set(files)
    assert files["adapter_model.safetensors"] == (output / "adapter_model.safetensors").read_bytes()
    assert b"PeftModel.from_pretrained(base, 'me/mine')" in files["README.md"]
    assert str(output).encode() not in files["README.md"]
    local = str((job.parent / "model").resolve()).encode()
    assert not [name for name in ("README.md", "adapter_config.json") if local in files[name]], "nobody else has it"
    assert not [name for name in files if "checkpoint" in name or "config.yaml" in name or "engine" in name]
    base = AutoModelForCausalLM.from_pretrained(job.parent / "model")
    PeftModel.from_pretrained(base, str(fetched(hub, "me/mine", tmp_path)))


def test_the_token_is_written_nowhere(output: Path, hub: Hub) -> None:
    for path in [p for p in output.parent.rglob("*") if p.is_file()]:
        assert TOKEN.encode() not in path.read_bytes(), path
    assert not [1 for files in hub.repos.values() for content in files.values() if TOKEN.encode() in content]


def push(hub: Hub, home: Path, *args: str, token: str = TOKEN) -> tuple[int, str]:
    done = start("ds-longft", "push", *args, **environment(hub, home, token))
    assert TOKEN not in done.stdout + done.stderr
    return done.returncode, done.stdout + done.stderr


def test_push_merged_with_card_and_report(hub: Hub, output: Path, tmp_path: Path) -> None:
    code, text = push(hub, tmp_path, str(output), "me/merged", "--merged")
    assert (code, "/me/merged/commit/" in text) == (0, True), text
    assert {"model.safetensors", "README.md", "report.html"} <= set(hub.repos["me/merged"])
    folder = fetched(hub, "me/merged", tmp_path / "fetched")
    assert "AutoModelForCausalLM.from_pretrained('me/merged')" in (folder / "README.md").read_text()
    ids = AutoTokenizer.from_pretrained(folder)("what is 3 times 6?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(folder)(ids).logits.isfinite().all()
    assert not [p for p in output.iterdir() if p.name.startswith(".merged")]


def test_what_is_refused(hub: Hub, output: Path, tmp_path: Path) -> None:
    code, text = push(hub, tmp_path, str(output), "me/other", token="hf_" + "wrong" * 6)
    assert (code, "hub.repo me/other" in text, "hf auth login" in text) == (64, True, True), text
    assert "Traceback" not in text
    empty = tmp_path / "empty"
    empty.mkdir()
    code, text = push(hub, tmp_path, str(empty), "me/mine")
    assert (code, "holds no adapter and no model" in text) == (64, True), text
    (output / "report.md").write_text(f"my login is {TOKEN}")
    (output / "metrics.jsonl").rename(output / "kept")  # else the report is made anew
    code, text = push(hub, tmp_path, str(output), "me/mine")
    assert (code, "holds a login or a secret" in text) == (64, True), text
