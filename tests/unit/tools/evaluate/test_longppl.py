"""LongPPL: the key tokens and the number of its own package."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from longppl import longppl as package
from transformers import AutoModelForCausalLM

from ds_longft.cli import main
from tests.tokenizer import tiny_tokenizer
from tests.unit.tools.evaluate.test_needle import tiny_model

TOKENS, SHORT = 400, 64


def looking_far(folder: Path, seed: int) -> Path:
    """A model whose attention looks far away: some tokens become likely, others unlikely."""
    made = AutoModelForCausalLM.from_pretrained(tiny_model(folder))
    torch.manual_seed(seed)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    made.save_pretrained(folder)
    return folder


def test_the_number_of_its_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model by its own key tokens, and of another by the same. Thresholds are lower: random weights learnt nothing."""
    limits = {"alpha": 0.1, "beta": -9.0}
    monkeypatch.setattr("ds_longft.tools.evaluate.perplexity.GAIN", limits["alpha"])
    monkeypatch.setattr("ds_longft.tools.evaluate.perplexity.MOST", -limits["beta"])
    tokenizer = tiny_tokenizer()
    text = "one and two and three, and then the other: where? " * 60
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids
    (tmp_path / "text.txt").write_text(text)
    folders = [looking_far(tmp_path / name, seed) for seed, name in enumerate(("evaluator", "other"))]
    argv = ["--text", str(tmp_path / "text.txt"), "--length", str(TOKENS), "--texts", "1", "--json"]
    out = tmp_path / "eval"
    own = ["eval", "perplexity", str(folders[0]), *argv, "--short", str(SHORT), "--out", str(out)]
    given = ["eval", "perplexity", str(folders[1]), *argv, "--key_tokens", str(out / "perplexity.rows.jsonl")]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    for model, command in zip(models, (own, [*given, "--out", str(tmp_path / "two")]), strict=True):
        assert main(command) == 0
        ours = json.loads(capsys.readouterr().out)
        sizes = {"trunc_len": SHORT, "sliding_window": SHORT // 4}
        theirs = package.compute_longppl(text, model, models[0], tokenizer, tokenizer, **sizes, **limits)
        assert 5 < ours["key_tokens"] == theirs["n_key_token"] < TOKENS / 2
        assert ours["longppl"] == pytest.approx(float(theirs["longppl"]), rel=1e-4)
        assert ours["perplexity"] == pytest.approx(float(theirs["ppl"]), rel=1e-4)
    (tmp_path / "text.txt").write_text(text + " and more")
    assert main([*given[:3], *argv, "--texts", "1", "--length", "390", "--key_tokens", given[-1]]) == 64
    assert "on the same texts" in capsys.readouterr().err


def test_thresholds_as_published() -> None:
    from ds_longft.tools.evaluate import perplexity

    long, short = torch.tensor([0.0, 1.0, 1.0, 2.5, 1.9]).numpy(), torch.tensor([0.0, 3.1, 2.9, 9.0, 9.0]).numpy()
    assert perplexity.key_places(long, short) == [1, 4]
    rows = [{"key_tokens": [1, 4], "key_loss_sum": 2.9}, {"key_tokens": [2], "key_loss_sum": 0.4}]
    assert perplexity.longppl(rows) == {"longppl": round(math.exp(1.1), 3), "key_tokens": 3}
    assert perplexity.longppl([{"key_tokens": [], "key_loss_sum": 0.0}]) == {"longppl": None, "key_tokens": 0}
