"""Trajectories of agents, from the file to the targets: what is kept, what is cut, what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.formats import to_row
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.tools.look.statistics import statistics
from ds_longft.tools.make_data.convert import convert_set
from ds_longft.tools.make_data.lengths import Lengths
from tests.tokenizer import CHATML_WITH_TOOLS, tiny_tokenizer

TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {"type": "object", "properties": {}}}}]


def trajectory(steps: int, words: int = 6) -> dict[str, Any]:
    """A question, then calls with their results, then an answer."""
    messages = [{"role": "user", "content": "What is in the files?"}]
    for i in range(steps):
        call = {"type": "function", "function": {"name": "read", "arguments": {"file": f"f{i}"}}}
        messages.append({"role": "assistant", "content": "", "reasoning_content": f"thought {i}", "tool_calls": [call]})
        messages.append({"role": "tool", "content": f"result {i} " * words})
    return {
        "messages": [*messages, {"role": "assistant", "content": "Nothing.", "reasoning_content": "done"}],
        "tools": TOOLS,
    }


@pytest.fixture(scope="module")
def with_tools():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML_WITH_TOOLS
    return tokenizer


@pytest.fixture
def tokenized(tmp_path: Path, with_tools):
    def make(rows: list[dict[str, Any]], **settings: Any):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(**{"cache_dir": str(tmp_path / "cache"), "workers": 1, "max_length_tokens": 8192, **settings})
        return tokenize_sources([SourceConfig(path=str(path))], with_tools, data)

    return make


def targets(rows, tokenizer, index: int = 0) -> list[str]:
    row = rows.row(index)
    return [tokenizer.decode(row.input_ids[a:b]) for a, b in zip(row.span_start, row.span_end, strict=True)]


def called(i: int) -> str:
    return f'<tool_call>\n{{"name": "read", "arguments": {{"file": "f{i}"}}}}\n</tool_call><|im_end|>'


def test_calls_and_thoughts_are_trained_and_results_are_not(tokenized, with_tools) -> None:
    rows = tokenized([trajectory(2)])
    thoughts = [f"<think>\nthought {i}\n</think>\n\n" + called(i) for i in range(2)]
    assert targets(rows, with_tools) == [*thoughts, "<think>\ndone\n</think>\n\nNothing.<|im_end|>"]
    assert rows.tally.unused == {}
    text = with_tools.decode(rows.row(0).input_ids)
    assert json.dumps(TOOLS[0]) in text


def test_thoughts_that_are_not_kept(tokenized, with_tools) -> None:
    assert targets(tokenized([trajectory(1)], thinking="none"), with_tools) == [called(0), "Nothing.<|im_end|>"]
    later = trajectory(1)
    later["messages"] += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "thinking": "hm"},
    ]
    refused = tokenized([later, trajectory(1)], max_bad_fraction=1.0)
    assert list(refused.tally.bad) == ["the chat template rewrites an answer with thinking"]
    kept = tokenized([later], thinking="last")
    assert targets(kept, with_tools) == [called(0), "Nothing.<|im_end|>", "<think>\nhm\n</think>\n\nYes.<|im_end|>"]


def test_the_last_answer_alone(tokenized, with_tools) -> None:
    assert len(targets(tokenized([trajectory(3)], train_turns="last"), with_tools)) == 1


def test_a_long_trajectory_is_cut_between_turns(tokenized, with_tools) -> None:
    whole = tokenized([trajectory(12)])
    every, limit = targets(whole, with_tools), int(whole.lengths[0]) // 2
    cut = tokenized([trajectory(12)], overlong="cut_turns", max_length_tokens=limit)
    kept = targets(cut, with_tools)
    assert cut.tally.truncated == 1
    assert 3 < len(kept) < 12
    assert kept == every[: len(kept)]
    assert limit - 120 < cut.lengths[0] <= limit, "and no answer more would fit"
    assert cut.row(0).input_ids.tolist()[:-20] == whole.row(0).input_ids.tolist()[: cut.lengths[0] - 20]
    short = int(tokenized([trajectory(0)]).lengths[0])
    left = tokenized([trajectory(12), trajectory(0)], overlong="cut_turns", max_length_tokens=short)
    assert (len(left), left.tally.overlong) == (1, 1), "not even the first answer fits"


def test_what_each_window_keeps(tokenized) -> None:
    rows = tokenized([trajectory(steps, words=400) for steps in (1, 3, 8)], max_length_tokens=4096)
    assert rows.tally.overlong == 1
    found = statistics(rows, DataConfig(max_length_tokens=4096), dp=1, sp=1, accumulation=1, seed=0)
    shares = {window.window_tokens: (round(window.rows, 3), round(window.targets, 2)) for window in found.retention}
    assert shares[4096][0] == pytest.approx(2 / 3, abs=0.01)
    assert list(shares.values())[-1] == (1.0, 1.0)
    assert sorted(shares.values()) == list(shares.values())


def test_converted_rows_read_back_as_they_were(tmp_path: Path, with_tools) -> None:
    record = trajectory(2) | {"id": "a", "rubric": "x"}
    record["messages"][1]["tool_calls"][0]["id"] = "call00001"
    record["messages"][2] |= {"name": "read", "tool_call_id": "call00001"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    done = convert_set(
        SourceConfig(path=str(tmp_path / "rows.jsonl")), tmp_path / "out.jsonl", name="set", max_bad_fraction=0
    )
    assert done.tally.unused == {"rubric": 1}
    again = json.loads((tmp_path / "out.jsonl").read_text())
    before, after = (to_row(r, "messages", source="", origin="") for r in (record, again))
    assert (after.turns, after.tools) == (before.turns, before.tools)
    with_schemas, without = (Lengths(with_tools).rows([after.turns], [tools])[0] for tools in (after.tools, ""))
    assert with_schemas > without
