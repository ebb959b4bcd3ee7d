import json

import pytest
import yaml

from ds_longft.data import commands
from ds_longft.errors import ConfigError, DataError, ModelError
from tests.unit.data.conftest import chat


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
    commands.stats(config)
    assert "target share" in capsys.readouterr().out


def test_inspect_shows_what_is_trained(config, capsys):
    commands.inspect(config, row=3, json=True)
    shown = json.loads(capsys.readouterr().out)
    assert [part["text"] for part in shown["parts"] if part["loss_weight"]] == ["the answer [bold]<|im_end|>"]
    assert shown["origin"].endswith(":4")
    commands.inspect(config, row=3)
    assert "the answer [bold]<|im_end|>" in capsys.readouterr().out
    with pytest.raises(DataError, match="rows 0 to 19"):
        commands.inspect(config, row=20)


def test_synth_code_takes_lengths_like_the_config(tmp_path, capsys):
    commands.synth_code(str(tmp_path / "a.jsonl"), rows=1, context_tokens="2K", json=True)
    assert 1500 < json.loads(capsys.readouterr().out)["longest_tokens"] <= 2048
    with pytest.raises(ConfigError, match="context_tokens"):
        commands.synth_code(str(tmp_path / "a.jsonl"), context_tokens="much")
    with pytest.raises(ConfigError, match="part"):
        commands.synth_code(str(tmp_path / "a.jsonl"), part="test")


def test_a_model_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer can be read"):
        commands.synth_code(str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path))
