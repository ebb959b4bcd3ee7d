import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from ds_longft.errors import ConfigError, DataError, ModelError
from ds_longft.tools.look import commands
from ds_longft.tools.look.commands import load_tokenizer
from ds_longft.tools.make_data import commands as recipe_commands
from ds_longft.tools.make_data.synth import commands as synth
from tests.unit.conftest import chat
from tests.unit.tools.make_data.texts import english


@pytest.fixture
def config(tmp_path, tokenizer, write_jsonl):
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [chat(f"question {i}", "the answer [bold]") for i in range(20)]
    content = {
        "model": {"path": str(tmp_path / "model")},
        "data": {
            "train": [{"path": write_jsonl(rows)}],
            "max_length_tokens": 512,
            "cache_dir": str(tmp_path / "cache"),
            "workers": 1,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


def test_tokenize_and_stats_agree(config, capsys):
    commands.tokenize(config, json=True)
    tokenized = json.loads(capsys.readouterr().out)["train"]
    commands.stats(config, dp=2, sp=4, json=True)
    stats = json.loads(capsys.readouterr().out)
    assert tokenized["rows"] == stats["rows"] == sum(bucket["rows"] for bucket in stats["lengths"]) == 20
    assert tokenized["fingerprint"] == stats["fingerprint"]
    assert 0 < stats["target_share"] < 1
    assert 0 < stats["filled"] <= 1
    assert stats["steps_per_epoch"] == -(-stats["packs"] // 2)
    commands.tokenize(config)
    assert "target share" in capsys.readouterr().out


def test_stats_of_pairs_tell_which_answers_are_longer(config, write_jsonl, capsys):
    rows = [{"prompt": "which", "chosen": "word " * n, "rejected": "word " * m} for n, m in ((9, 2), (9, 2), (2, 9))]
    asked = (config, "--objective", "dpo", "--data.train", write_jsonl(rows, "pairs.jsonl"))
    commands.stats(asked, json=True)
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert pairs["chosen_longer"] == pytest.approx(2 / 3)
    assert pairs["median_chosen_tokens"] > pairs["median_rejected_tokens"] > 0
    assert pairs["median_prompt_tokens"] > 0
    commands.stats(asked)
    shown = capsys.readouterr().out
    assert "pairs in a pack" in shown
    assert "67%" in shown
    commands.stats(config, json=True)
    assert "pairs" not in json.loads(capsys.readouterr().out)


def test_stats_tell_sources_languages_packs_and_cost(config, tmp_path, capsys):
    page = tmp_path / "new" / "stats.html"
    commands.stats(config, dp=2, sp=4, html=str(page), json=True)
    stats = json.loads(capsys.readouterr().out)
    assert [group["name"] for group in stats["sources"]] == ["rows.jsonl"]
    assert [group["name"] for group in stats["languages"]] == ["unknown"]
    assert sum(bucket["tokens"] for bucket in stats["lengths"]) == stats["tokens"]
    assert sum(bucket["by_source"]["rows.jsonl"] for bucket in stats["lengths"]) == stats["rows"]
    assert stats["sources"][0]["attention_share"] == pytest.approx(1)
    assert 1 <= stats["imbalance"] < 2
    html = page.read_text()
    assert "<svg" in html
    assert "http" not in html, "the page needs nothing else"
    commands.stats(config)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("attention", "padding tokens", "slowest rank", "trained"))
    with pytest.raises(ConfigError, match="--dp is 0"):
        commands.stats(config, dp=0)


def test_the_page_says_how_many_rows_were_cut(config, tmp_path, capsys):
    content = yaml.safe_load(Path(config).read_text())
    commands.stats(config, json=True)
    longest = json.loads(capsys.readouterr().out)["longest_tokens"]
    content["data"] |= {"max_length_tokens": longest - 1, "overlong": "truncate"}
    Path(config).write_text(yaml.safe_dump(content))
    page = tmp_path / "stats.html"
    commands.stats(config, html=str(page), json=True)
    assert "rows cut to fit" in page.read_text()


def test_a_stream_is_shown_by_its_first_window(config, capsys):
    content = yaml.safe_load(Path(config).read_text())
    content["data"]["stream_window_mib"] = 1
    Path(config).write_text(yaml.safe_dump(content | {"train": {"max_steps": 3}}))
    commands.stats(config, json=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["rows"] == 20
    assert "data.train is a stream: this is its first window" in shown.err


def test_inspect_shows_what_is_trained(config, capsys):
    commands.inspect(config, row=3, json=True)
    shown = json.loads(capsys.readouterr().out)
    assert [part["text"] for part in shown["parts"] if part["loss_weight"]] == ["the answer [bold]<|im_end|>"]
    assert shown["origin"].endswith(":4")
    commands.inspect(config, row=3)
    assert "the answer [bold]<|im_end|>" in capsys.readouterr().out
    with pytest.raises(DataError, match="rows 0 to 19"):
        commands.inspect(config, row=20)


def test_inspect_shows_a_pack_with_its_borders(config, capsys):
    commands.inspect(config, pack=1, json=True)
    shown = json.loads(capsys.readouterr().out)
    documents = shown["documents"]
    assert len(documents) > 1
    assert sum(document["tokens"] for document in documents) <= 512
    assert all(document["parts"][-2]["text"] == "the answer [bold]<|im_end|>" for document in documents)
    commands.inspect(config, pack=1)
    text = capsys.readouterr().out
    assert text.count("tokens ") >= len(documents)
    assert f"pack 1: {len(documents)} documents" in text
    commands.inspect(config, pack=1, epoch=1, json=True)
    assert json.loads(capsys.readouterr().out)["documents"] != documents
    with pytest.raises(DataError, match="pack 99 does not exist: epoch 0 has packs 0 to"):
        commands.inspect(config, pack=99)
    with pytest.raises(ConfigError, match="--epoch is -1"):
        commands.inspect(config, pack=0, epoch=-1)


def test_convert_synth_and_their_mistakes(tmp_path, write_jsonl, capsys):
    texts = [{"text": english(80, seed), "lang": "en"} for seed in range(3)]
    out = str(tmp_path / "out.jsonl")
    recipe_commands.convert(write_jsonl([*texts, {"text": ""}]), out, max_bad_fraction=0.5)
    shown = capsys.readouterr().out
    assert "3 text rows (3 en)" in shown
    assert "1 of 4 rows left out\n  - 1 x empty text, first" in shown
    assert "rows.jsonl:4" in shown
    few = replace(synth.NEEDLE, rows=3, context_tokens="1K", json=True)
    synth.needle(out, str(tmp_path / "needle.jsonl"), flags=few)
    assert json.loads(capsys.readouterr().out)["rows"] == 3
    reading = [{"context": t["text"], "qas": [{"question": "q?", "answer": "a"}], "lang": "en"} for t in texts]
    synth.refgpt8x(write_jsonl(reading, "reading.jsonl"), out, rows=2)
    assert "2 rows of" in capsys.readouterr().out
    for wrong in (
        lambda: recipe_commands.convert(out, out, format="xml"),
        lambda: recipe_commands.convert(out, out, limit=0),
        lambda: synth.needle(out, out, tasks="recall,guess"),
        lambda: synth.needle(out, out, flags=replace(synth.NEEDLE, context_tokens="long")),
        lambda: synth.refgpt8x(out, out, mean_references=0),
        lambda: recipe_commands.mix("recipes/faro.yaml", str(tmp_path), root=str(tmp_path / "no")),
    ):
        with pytest.raises(ConfigError):
            wrong()


def test_synth_code_takes_lengths_like_the_config(tmp_path, capsys):
    synth.code(str(tmp_path / "a.jsonl"), flags=replace(synth.CODE, rows=1, context_tokens="2K", json=True))
    assert 1500 < json.loads(capsys.readouterr().out)["longest_tokens"] <= 2048
    with pytest.raises(ConfigError, match="context_tokens"):
        synth.code(str(tmp_path / "a.jsonl"), flags=replace(synth.CODE, context_tokens="much"))
    with pytest.raises(ConfigError, match="part"):
        synth.code(str(tmp_path / "a.jsonl"), part="test")


def test_a_model_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer can be read"):
        synth.code(str(tmp_path / "a.jsonl"), flags=replace(synth.CODE, tokenizer=str(tmp_path)))


def test_a_tokenizer_below_the_home_folder(tmp_path, monkeypatch, tokenizer):
    """As `model.path` in recipes; a run reads it, and `data stats` asked the hub for it."""
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_tokenizer("~/model")) == len(tokenizer)
