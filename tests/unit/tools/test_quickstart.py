"""The quickstart's rows: none is lost to its length, and what is trained of them are the answers and their stops."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from ds_longft.config.run_config import DataConfig, SourceConfig
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.tools import quickstart
from tests.unit.data.test_borders import CHATML, greedy_bytes

TOKENS = 1536


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer that merges line ends with the indents behind them, which a border then cuts, as SmolLM2's does."""
    folder = tmp_path_factory.mktemp("model")
    made = PreTrainedTokenizerFast(tokenizer_object=greedy_bytes(), eos_token="<|im_end|>", chat_template=CHATML)
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", ["train", "eval"])
def test_every_row_is_kept_and_trained_on_its_answers(part, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "TRAIN_ROWS", 4)
    path = tmp_path / f"code-{part}-{TOKENS}.jsonl"
    quickstart._write_rows(path, quickstart.CODE_SET.fullmatch(path.name), model)
    rows = [json.loads(line) for line in path.open()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    source = SourceConfig(path=str(path))
    data = DataConfig(train=[source], max_length_tokens=TOKENS, cache_dir=str(tmp_path / "cache"), workers=1)
    found = tokenize_sources([source], tokenizer, data)
    assert len(found) == len(rows) == {"train": 4, "eval": quickstart.EVAL_ROWS}[part]
    assert found.tally.overlong == 0
    assert found.lengths.max() > 0.98 * TOKENS
    for number, row in enumerate(rows):
        tokens = found.row(number)
        trained = [
            tokenizer.decode(tokens.input_ids[start:end])
            for start, end in zip(tokens.span_start, tokens.span_end, strict=True)
        ]
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert trained == [f"{answer}<|im_end|>" for answer in answers]
        assert tokens.span_weight.tolist() == [1.0] * len(answers)
