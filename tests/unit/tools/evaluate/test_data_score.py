"""`data score`: two losses of each row, the rows in their order, and a mix that goes by them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_longft.cli import main
from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.tools.evaluate.data_score import SCORES
from ds_longft.tools.make_data.mix import mix_sources
from ds_longft.tools.make_data.recipe import Recipe
from tests.unit.conftest import chat
from tests.unit.tools.evaluate.test_needle import tiny_model
from tests.unit.tools.make_data.texts import english

SHORT = 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One whose attention looks far away, so that context is worth something, good or bad."""
    folder = tiny_model(tmp_path / "model")
    made = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.2)
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    made = [{**chat(english(n, n), english(3, 100 + n)), "mine": n} for n in (12, 2, 8)] + [
        chat("too long " * 9000, "no")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made) + "no json\n")
    return path


def mean_loss(model: torch.nn.Module, ids: list[int], targets: range, window: int) -> float:
    """Of the targets, each read with a quarter of a window to a whole one before it, by a forward pass of each window."""
    total, step = 0.0, window - window // 4
    for start in range(0, len(ids), step):
        part = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            losses = -model(part).logits[0].log_softmax(-1)
        first = start + window // 4 if start else 1
        counted = [at for at in targets if first <= at < start + window]
        total += sum(float(losses[at - 1 - start, ids[at]]) for at in counted)
    return total / len(targets)


def test_losses_by_definition(
    model: Path,
    rows: Path,
    tmp_path: Path,
    on_two_ranks: Callable[[list[str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The long one is that of a forward pass over the row; the short one of a pass over each window of it."""
    out = tmp_path / "scored.jsonl"
    argv = ["data", "score", str(model), str(rows), str(out), "--short", str(SHORT), "--json"]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["left_out"], result["rows_made_now"]) == (3, 2, 3)
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    gains = [row["context_gain"] for row in scored]
    assert gains == sorted(gains, reverse=True)
    assert sorted(row["mine"] for row in scored) == [2, 8, 12], "what a row held is there"
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in scored:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        answer = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        targets = range(len(answer), len(ids) - 1)  # up to <|im_end|>, without the newline behind it
        assert row["tokens"] == len(ids)
        assert row["loss_long"] == pytest.approx(mean_loss(plain, ids, targets, len(ids)), abs=1e-4)
        assert row["loss_short"] == pytest.approx(mean_loss(plain, ids, targets, SHORT), abs=1e-4)
        assert row["context_gain"] == pytest.approx(row["loss_short"] - row["loss_long"], abs=2e-5)
    assert any(abs(gain) > 1e-3 for gain in gains)
    first = out.read_text()
    saved = tmp_path / "scored.jsonl.scores" / "score.rows.jsonl"
    saved.write_text("\n".join(saved.read_text().splitlines()[:2]) + "\n")  # stopped after the first row
    on_two_ranks([*argv, "--sp", "2"])
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["rows_made_now"] == 0, "two ranks have made the rest"
    for again, before in zip(out.read_text().splitlines(), first.splitlines(), strict=True):
        here, there = json.loads(again), json.loads(before)
        for name in SCORES:
            assert here.pop(name) == pytest.approx(there.pop(name), abs=1e-4)
        assert here == there


def test_gains_of_each_target_are_what_a_run_weighs_by(model: Path, rows: Path, tmp_path: Path) -> None:
    """Their mean is the row's gain, and the tokenized set of a run takes them."""
    out = tmp_path / "scored.jsonl"
    assert main(["data", "score", str(model), str(rows), str(out), "--short", str(SHORT), "--tokens"]) == 0
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    for row in scored:
        assert sum(row["token_gains"]) / len(row["token_gains"]) == pytest.approx(row["context_gain"], abs=0.05)
    data = DataConfig(weighting="gain", cache_dir=str(tmp_path / "cache"), workers=1)
    made = tokenize_sources([SourceConfig(path=str(out))], AutoTokenizer.from_pretrained(model), data)
    assert made.targets.tolist() == [len(row["token_gains"]) for row in scored]
    wanted = [np.minimum(np.exp(row["token_gains"]), 5).sum() for row in scored]
    np.testing.assert_allclose(made.weight_sums("gain"), wanted, rtol=1e-5)
    assert any(set(row["token_gains"]) - {0.0} for row in scored)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_file(model: Path, tmp_path: Path) -> None:
    path, give_up = tmp_path / "many.jsonl", time.monotonic() + 250
    path.write_text("".join(json.dumps(chat(english(30, n), english(3, 500 + n))) + "\n" for n in range(60)))

    def argv(out: str) -> list[str]:
        program = "import sys; from ds_longft.cli import main; sys.exit(main(sys.argv[1:]))"
        score = ["data", "score", str(model), str(path), str(tmp_path / out), "--short", str(SHORT), "--tokens"]
        return [sys.executable, "-c", program, *score, "--json"]

    killed = subprocess.Popen(argv("scored.jsonl"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = tmp_path / "scored.jsonl.scores" / "score.rows.jsonl"
    while not rows.exists() or len(rows.read_bytes().splitlines()) < 6:
        assert killed.poll() is None, "it ended before it was killed"
        assert time.monotonic() < give_up
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -9
    assert not (tmp_path / "scored.jsonl").exists(), "nothing half written"
    there = rows.read_bytes().rpartition(b"\n")[0]
    gone_on = subprocess.run(argv("scored.jsonl"), capture_output=True, check=True)
    assert json.loads(gone_on.stdout)["rows_made_now"] == 60 - (len(there.splitlines()) - 1) < 60
    assert rows.read_bytes().startswith(there)
    subprocess.run(argv("whole.jsonl"), capture_output=True, check=True)
    assert (tmp_path / "scored.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_mix_takes_what_gained_most(tmp_path: Path) -> None:
    gains = [0.3, 0.01, None, 0.2, 0.1]
    made = [{**chat(english(20, i), english(4, 50 + i)), "id": str(i)} for i in range(5)]
    made = [row | ({} if gain is None else {"context_gain": gain}) for row, gain in zip(made, gains, strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))

    def taken(source: dict[str, Any], **keys: Any) -> set[str]:
        given = {"sources": [{"name": "a", "path": "a.jsonl", **source}], "max_length_tokens": 4096, "held_out": 0}
        mix_sources(Recipe.model_validate({**given, **keys}), tmp_path / "out", root=tmp_path)
        lines = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
        assert all(("context_gain" in json.loads(line)) == (json.loads(line)["id"] != "2") for line in lines)
        return {json.loads(line)["id"] for line in lines}

    assert taken({}, choose="context_gain", total_rows=3) == {"0", "3", "4"}
    assert taken({"least": {"context_gain": 0.1}}) == {"0", "3", "4"}
    assert taken({}, choose="context_gain") == {"0", "1", "2", "3", "4"}
    assert taken({"rows": 1}, choose="context_gain") == {"0"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--short", "4"], "--short is 4: expected 8 or more"),
        (["--sp", "0"], "--sp is 0"),
        (["--gpus", "3", "--sp", "2"], "divide"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(["data", "score", "no-model", "rows.jsonl", str(tmp_path / "out"), *flags]) == 64
    assert said in capsys.readouterr().err
