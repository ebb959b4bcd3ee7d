"""What a run notes about its data is what it trains on."""

from __future__ import annotations

import json
from pathlib import Path

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.train.data_facts import sample, write_data_facts
from tests.tokenizer import tiny_tokenizer


def test_statistics_and_sample(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {i} " * (i + 1)},
                {"role": "assistant", "content": "answer"},
            ]
        }
        for i in range(6)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"messages": []}\n')
    tokenizer = tiny_tokenizer()
    config = DataConfig(cache_dir=str(tmp_path / "cache"), workers=1, max_length_tokens=4096, max_bad_fraction=1)
    tokenized = tokenize_sources([SourceConfig(path=str(file))], tokenizer, config)
    train, held_out = tokenized.split(0.34, 0)
    write_data_facts(tmp_path, train, held_out, tokenizer, 7)
    facts = json.loads((tmp_path / "data.json").read_text())
    assert facts["total_steps"] == 7
    assert facts["parts"]["train"]["rows"] == 4
    assert facts["parts"]["held out"]["rows"] == 2
    assert facts["parts"]["train"]["bad_rows"] == 1
    assert "bad_rows" not in facts["parts"]["held out"], "it was counted before the split"
    assert facts["parts"]["train"]["tokens"] == int(train.lengths.sum())
    assert sum(facts["parts"]["train"]["rows_up_to_tokens"].values()) == 4
    assert facts["parts"]["train"]["sources"] == {str(file): 4}
    assert facts["sample"]["trained"].startswith("answer")
    assert facts["sample"]["before"].endswith("<|im_start|>assistant\n")
    assert not facts["sample"]["before"].startswith("…"), "it is whole"


def test_a_sample_that_is_cut_says_so(tmp_path: Path) -> None:
    """Without the broken half of a character where it was cut."""
    turns = [{"role": "user", "content": "é" * 900}, {"role": "assistant", "content": "é" * 900}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    tokenizer = tiny_tokenizer()
    config = DataConfig(cache_dir=str(tmp_path / "cache"), workers=1, max_length_tokens=8192)
    rows = tokenize_sources([SourceConfig(path=str(tmp_path / "chats.jsonl"))], tokenizer, config)
    shown = sample(rows, tokenizer)
    assert shown is not None
    assert shown["before"].startswith("… é")
    assert shown["trained"].endswith("é …")
