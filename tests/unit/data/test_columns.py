"""Nothing that a row holds is dropped in silence: a canary in every column of every layout is found again somewhere."""

import json

import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.columns import ASKED, BOOKKEEPING, EVERY_CHAT, EVERY_ROW, LAYOUTS, is_bookkeeping
from ds_longft.data.readers import find_source
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.tools.make_data.convert import layout_of as layout_of_source
from tests.tokenizer import CHATML_WITH_TOOLS, tiny_tokenizer

CANARY = "kanarienvogel"


def messages(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def value(column, words):
    """A valid value of a column, with these words in it."""
    if column in ("messages", "conversations"):
        return messages(f"{words}?", "so")
    if column in ("tools", "functions"):
        return [{"name": "f", "description": words, "parameters": {"type": "object", "properties": {}}}]
    return {
        "dialogue": f"<start_chat><Human 1>: {words}? <Assistant 1>: so <end_chat>",
        "qas": [{"question": words, "answers": ["so"]}],
        "history": [[words, "so"]],
        "weight": 1,
        "length": 9,
    }.get(column, f"{words} of {column}")


@pytest.fixture(scope="module")
def with_tools():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML_WITH_TOOLS
    return tokenizer


COLUMNS = sorted(
    {column for layout in LAYOUTS for column in layout.columns} | {"file", "solution", "label", "rejected_response"}
)
CASES = [(layout, column) for layout in LAYOUTS if layout.format != "longalign" for column in COLUMNS]


@pytest.mark.parametrize(("layout", "column"), CASES, ids=lambda x: x if isinstance(x, str) else "+".join(x.needs))
def test_a_canary_is_trained_on_or_named(layout, column, tmp_path, with_tools):
    record = {name: value(name, "plain words") for name in layout.needs} | {column: value(column, CANARY)}
    if layout.format == "preference":
        if column == "conversations":
            record[column] = messages(CANARY)
        elif column not in ASKED:
            record["prompt"] = "plain words"
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n")
    source = SourceConfig(path=str(path))
    data = DataConfig(cache_dir=str(tmp_path / "cache"), workers=1, max_bad_fraction=1.0)
    rows = tokenize_sources([source], with_tools, data, pairs=layout_of_source(find_source(source)) == "preference")
    text = "".join(with_tools.decode(document.input_ids) for document in rows.documents(0))
    facts = rows.column("source")[0], rows.column("language")[0]
    named = any(column in what.split() for what in rows.tally.unused)
    assert CANARY in text or CANARY in str(facts) or named or is_bookkeeping(column) or column == "weight", (
        record,
        text,
    )
    assert not (named and CANARY in text)


def test_each_column_is_in_one_list_only():
    read = {column for layout in LAYOUTS for column in layout.columns} - {"length"}
    assert not read & BOOKKEEPING
    assert not any(is_bookkeeping(column) for column in read)
    assert not set(EVERY_ROW) & set(EVERY_CHAT)


def test_unused_columns_and_keys_are_counted_and_said_once(write_jsonl, tmp_path, tokenizer, capsys):
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "audio": "x"}],
            "rubric": "r",
            "id": i,
        }
        for i in range(3)
    ]
    data = DataConfig(cache_dir=str(tmp_path / "cache"), workers=1)
    for _ in range(2):  # from the cache too
        made = tokenize_sources([SourceConfig(path=write_jsonl(rows))], tokenizer, data, progress=True)
        assert made.tally.unused == {"rubric": 3, "audio of a message": 3}
    assert capsys.readouterr().err.count("not used, of 3 rows: audio of a message (3 rows), rubric (3 rows)") == 1
