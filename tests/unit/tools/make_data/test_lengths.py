import copy

import pytest

from ds_longft.data.rows import Turn
from ds_longft.errors import ConfigError
from ds_longft.tools.make_data.language import language_of_text
from ds_longft.tools.make_data.lengths import Lengths
from tests.unit.tools.make_data.texts import chinese, english


def test_counted_lengths_are_those_of_the_tokenized_set(tokenizer, tmp_path):
    from ds_longft.config.data_keys import SourceConfig
    from ds_longft.config.run_config import DataConfig
    from ds_longft.data.tokenize import tokenize_sources

    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "q q"}, {"role": "assistant", "content": "an answer"}]}'
    )
    data = DataConfig(cache_dir=str(tmp_path), workers=1)
    rows = tokenize_sources([SourceConfig(path=str(tmp_path / "a.jsonl"))], tokenizer, data)
    assert Lengths(tokenizer).rows([[Turn("user", "q q"), Turn("assistant", "an answer")]]) == rows.lengths.tolist()
    assert Lengths(tokenizer).exact


def test_plain_text_is_counted_without_a_chat_template(tokenizer):
    base = copy.copy(tokenizer)
    base.chat_template = None
    text = [Turn("text", "some words")]
    assert Lengths(base).rows([text]) == Lengths(tokenizer).rows([text])
    with pytest.raises(ConfigError, match=r"no chat template.*--tokenizer"):
        Lengths(base).rows([text, [Turn("user", "q"), Turn("assistant", "a")]])


def test_estimates_know_chinese_from_english():
    lengths = Lengths()
    text, han = english(50, 0), chinese(50, 0)
    assert lengths.text(text) == pytest.approx(len(text) / 4.1, rel=0.01)
    assert lengths.text(han) == pytest.approx(len(han) / 1.05, rel=0.05)
    assert not lengths.exact


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("话说天下大势，分久必合，合久必分。", "zh"),
        ("使用 PostgreSQL 的 pg_dump 命令备份数据库，然后 restore。", "zh"),
        ("吾輩は猫である。名前はまだ無い。", "ja"),
        ("나는 고양이로소이다. 이름은 아직 없다.", "ko"),
        ("The treaty of 1842 (南京條約) was signed aboard a ship near the city.", "en"),
        ("Das ist ein Text in deutscher Sprache, und er ist lang genug.", "de"),
        ("def f(x):\n    return x + 1  # the next number, as an integer", "en"),
        ("OK", "und"),
        ("12 + 30 = 42", "und"),
    ],
)
def test_languages(text, code):
    assert language_of_text(text) == code


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    from ds_longft.errors import LongftError

    monkeypatch.setitem(__import__("sys").modules, "py3langid", None)
    assert language_of_text("话说天下大势") == "zh"
    with pytest.raises(LongftError, match=r"py3langid: pip install 'ds-longft\[synth\]'"):
        language_of_text("a text in some language or other")
