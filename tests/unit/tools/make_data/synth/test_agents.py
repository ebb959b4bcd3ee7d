"""Made trajectories: every result is what the tool gave back, the answer is in the files, lengths are as asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_longft.cli import main
from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.formats import to_row
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.agents import SCHEMAS, FileSystem, agent_rows
from ds_longft.tools.make_data.synth.row_plan import Wanted
from tests.tokenizer import CHATML_WITH_TOOLS, tiny_tokenizer


@pytest.fixture(scope="module")
def rows():
    return list(agent_rows(Wanted(12, 64_000, 1, "agents"), shortest_tokens=8_000))


def test_tools_do_what_their_schemas_say() -> None:
    system = FileSystem({"a/x.txt": ["one", "two sea"], "a/y.txt": ["sea"], "b/z.txt": ["sea"]})
    assert system.run("list_folder", {"folder": "a"}) == "x.txt\ny.txt"
    assert system.run("read_file", {"path": "a/x.txt"}) == "one\ntwo sea"
    assert system.run("search", {"folder": "a", "word": "sea"}) == "a/x.txt:2: two sea\na/y.txt:1: sea"
    assert system.run("search", {"folder": "a", "word": "moon"}) == "nothing found"
    assert "error" in system.run("read_file", {"path": "c"})


def test_the_answer_follows_from_what_was_read(rows) -> None:
    known = {schema["function"]["name"]: set(schema["function"]["parameters"]["required"]) for schema in SCHEMAS}
    for record in rows:
        turns = to_row(record, "messages", source="x", origin="x:1").turns
        subject = turns[1].content.removeprefix("What is the count of ").partition("?")[0]
        read = [turn.content for turn in turns if turn.role == "tool"]
        assert f"The count of {subject} is {turns[-1].content}." in read[-1]
        assert not any(subject in text for text in read[:-2]), "nothing before the search tells it"
        for turn in turns:
            for call in turn.calls:
                assert set(json.loads(call.arguments)) == known[call.name]


def test_lengths_and_seed(rows) -> None:
    lengths = Lengths()
    made = [to_row(record, "messages", source="x", origin="x:1") for record in rows]
    tokens = lengths.rows([row.turns for row in made], [row.tools for row in made])
    assert min(tokens) > 6_000
    assert max(tokens) < 80_000
    assert max(tokens) > 2 * min(tokens)
    again = list(agent_rows(Wanted(2, 64_000, 1, "agents"), shortest_tokens=8_000))
    assert again == rows[:2]


def test_they_are_tokenised_with_every_call_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "agents.jsonl"
    assert (
        main(["data", "synth", "agents", str(out), "--rows", "3", "--shortest_tokens", "2K", "--context_tokens", "6K"])
        == 0
    )
    assert "3 rows" in capsys.readouterr().out
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML_WITH_TOOLS
    data = DataConfig(cache_dir=str(tmp_path / "cache"), workers=1, max_length_tokens=100_000)
    tokenized = tokenize_sources([SourceConfig(path=str(out))], tokenizer, data)
    assert (len(tokenized), tokenized.tally.unused) == (3, {})
    for i, line in enumerate(out.read_text().splitlines()):
        answers = [m for m in json.loads(line)["messages"] if m["role"] == "assistant"]
        assert len(tokenized.row(i).span_start) == len(answers)
    assert main(["data", "synth", "agents", str(out), "--shortest_tokens", "8K", "--context_tokens", "4K"]) == 64
