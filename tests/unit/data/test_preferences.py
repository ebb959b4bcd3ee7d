"""Preference rows: every layout gives the same pair; what cannot be used is named; a pair is two documents of one pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_longft.batch import IGNORE_INDEX
from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data.loader import StepLoader
from ds_longft.data.pairs import PairSet, pair_sides
from ds_longft.data.preferences import to_preference
from ds_longft.data.rows import BadRow
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import DataError

ASK = [{"role": "user", "content": "q"}]
GOOD, BAD = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
MORE = [*ASK, *GOOD, {"role": "user", "content": "r"}]


def turns(record: dict[str, Any]) -> list[list[tuple[str, str, bool]]]:
    """(role, content, whether it is trained) of both rows."""
    pair = to_preference(record, source="x", origin="x:1")
    return [[(t.role, t.content, t.trained) for t in row.turns] for row in pair.documents]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        {"chosen": ASK + GOOD, "rejected": ASK + BAD},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": ASK + GOOD, "rejected": ASK + BAD, "score": 3},
        {"prompt": ASK, "chosen": ASK + GOOD, "rejected": BAD},
        {"prompt": ASK, "chosen": "a", "rejected": "b"},
    ],
)
def test_layouts(record: dict[str, Any]) -> None:
    asked = ("user", "q", False)
    assert turns(record) == [[asked, ("assistant", "a", True)], [asked, ("assistant", "b", True)]]


def test_answers_of_the_prompt_are_not_trained() -> None:
    (chosen, rejected) = turns({"prompt": MORE, "chosen": GOOD, "rejected": BAD})
    assert [trained for role, _, trained in chosen if role == "assistant"] == [False, True]
    assert turns({"chosen": MORE + GOOD, "rejected": MORE + BAD}) == [chosen, rejected]


def talk(*contents: str, system: str = "") -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *said] if system else said


@pytest.mark.parametrize("prompt", [None, "q1", "q2", " q2\n", talk("q1"), talk("q1", "a1", "q2")])
@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_prompt_that_says_a_part_again_changes_nothing(prompt: Any, system: str) -> None:
    """orpo-dpo-mix and capybara-dpo have the first or the last question beside whole conversations."""
    record = {
        "chosen": talk("q1", "a1", "q2", "a", system=system),
        "rejected": talk("q1", "a1", "q2", "b", system=system),
    }
    pair = to_preference(record | ({"prompt": prompt} if prompt else {}), source="x", origin="x:1")
    asked = [turn.content for turn in pair.prompt]
    assert asked == ([system] if system else []) + ["q1", "a1", "q2"]
    assert ([t.content for t in pair.chosen], [t.content for t in pair.rejected]) == (["a"], ["b"])
    assert pair.unused == ()


def test_alpaca_pairs_keep_their_input_and_history() -> None:
    record = {
        "instruction": "q",
        "input": "The document.",
        "history": [["h", "i"]],
        "chosen": "a",
        "rejected": "b",
        "system": "s",
    }
    pair = to_preference(record, source="x", origin="x:1")
    assert [t.content for t in pair.prompt] == ["s", "h", "i", "q\n\nThe document."]
    assert not any(t.trained for t in pair.documents[0].turns[:-1])


def test_pairs_with_tools() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w", "arguments": {}}}]}
    record = {
        "prompt": "q",
        "tools": [{"name": "w"}],
        "chosen": [call, {"role": "tool", "content": "7"}, *GOOD],
        "rejected": BAD,
    }
    pair = to_preference(record, source="x", origin="x:1")
    assert [t.role for t in pair.chosen] == ["assistant", "tool", "assistant"]
    assert all(json.loads(row.tools)[0]["function"] == {"name": "w"} for row in pair.documents)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"prompt": "z", "chosen": talk("q1", "a"), "rejected": talk("q1", "b")},
            "the prompt is not in what chosen and rejected begin with",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": " a "}, "chosen and rejected are the same"),
        ({"chosen": ASK + GOOD, "rejected": ASK + GOOD}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen holds an empty message"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is null or missing"),
        ({"prompt": ASK, "chosen": [], "rejected": BAD}, "chosen is empty"),
        ({"chosen": ASK + GOOD, "rejected": [{"role": "user", "content": "r"}, *BAD]}, "no prompt"),
        (
            {"prompt": "q", "chosen": [{"role": "user", "content": "r"}, *GOOD], "rejected": BAD},
            "wrong role order in chosen",
        ),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen is not a string"),
        ({"chosen": [], "rejected": []}, "no prompt"),
    ],
)
def test_bad_pairs(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as bad:
        to_preference(record, source="x", origin="x:1")
    assert bad.value.reason == reason


def pair(i: int, words: int = 1, **more: Any) -> dict[str, Any]:
    ask = [{"role": "user", "content": f"What is {i} times {i + 3}? " + "Think again. " * words}]
    right, wrong = f"It is {i * (i + 3)}.", "Nobody knows" + "!" * (i % 5)
    return {
        "prompt": ask, "chosen": [{"role": "assistant", "content": right}], "rejected": [{"role": "assistant", "content": wrong}], **more,
    }  # fmt: skip


@pytest.fixture
def tokenized(tmp_path: Path, tokenizer: Any):
    def make(rows: list[dict[str, Any]], **settings: Any) -> PairSet:
        path = tmp_path / f"rows-{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(**{"cache_dir": str(tmp_path / "cache"), "workers": 1, "max_length_tokens": 256, **settings})
        made = tokenize_sources([SourceConfig(path=str(path))], tokenizer, data, pairs=True)
        assert isinstance(made, PairSet)
        return made

    return make


def test_both_documents_are_whole_and_the_prompt_lies_on_disk_once(tokenized, tokenizer) -> None:
    rows = tokenized([pair(i, words=8) for i in range(6)])
    for i in range(6):
        chosen, rejected = rows.documents(i)
        for document, answer in ((chosen, f"It is {i * (i + 3)}."), (rejected, "Nobody knows" + "!" * (i % 5))):
            text = tokenizer.decode(document.input_ids)
            assert f"What is {i} times" in text
            trained = [
                tokenizer.decode(document.input_ids[a:b])
                for a, b in zip(document.span_start, document.span_end, strict=True)
            ]
            assert trained == [answer + "<|im_end|>"]
        assert rows.lengths[i] == len(chosen.input_ids) + len(rejected.input_ids)
        assert rows.targets[i] == chosen.targets + rejected.targets
        shared = len(chosen.input_ids) - chosen.targets - 4
        assert len(rows.row(i).input_ids) < rows.lengths[i] - shared


def test_bad_pairs_go_to_the_ledger(tokenized) -> None:
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    rows = tokenized([pair(1), same, {"chosen": "x", "rejected": "y"}, pair(2)], max_bad_fraction=0.6)
    assert rows.tally.bad == {"chosen and rejected are the same": 1, "no prompt": 1}
    assert len(rows) == 2


def test_a_long_prompt_is_cut_alike_for_both(tokenized, tokenizer) -> None:
    short = tokenized([pair(7, words=1)])
    limit = int(max(len(d.input_ids) for d in short.documents(0))) + 10
    assert len(tokenized([pair(7, words=40), pair(8)], max_length_tokens=limit)) == 1
    cut = tokenized([pair(7, words=40)], max_length_tokens=limit, overlong="truncate")
    chosen, rejected = (tokenizer.decode(d.input_ids) for d in cut.documents(0))
    assert max(len(d.input_ids) for d in cut.documents(0)) <= limit
    assert chosen.split("assistant\n")[0] == rejected.split("assistant\n")[0]
    assert chosen.endswith("It is 70.<|im_end|>\n")
    with pytest.raises(DataError, match="overlong is error"):
        tokenized([pair(7, words=40)], max_length_tokens=limit, overlong="error")


def loader(
    rows: PairSet, *, dp: int = 1, rank: int = 0, sp: int = 4, accumulation: int = 1, **settings: Any
) -> StepLoader:
    data = DataConfig(**{"max_length_tokens": 256, **settings})
    return StepLoader(rows, data=data, dp=dp, dp_rank=rank, sp=sp, accumulation=accumulation, seed=0, pad_id=0)


def test_the_fullest_pack_of_a_side_is_not_the_longest_pack(tokenized) -> None:
    """What two passes hold at once is one side: a pair with one long answer is more than a longer pair of two."""
    even, long, short = (pair(i, words=0) for i in range(3))
    even["chosen"], even["rejected"] = "a" * 100, "b" * 100
    long["chosen"], long["rejected"] = "a" * 150, "b"
    rows = tokenized([even, long, short])
    lengths = [[len(document.input_ids) for document in rows.documents(i)] for i in range(3)]
    assert rows.document_lengths.tolist() == lengths
    assert rows.part(np.array([2, 0]), "part").document_lengths.tolist() == [lengths[2], lengths[0]]
    packs = loader(rows, packing="none")
    assert packs.fullest_pack(0).rows == (0,)
    assert packs.fullest_pack(0, of_a_side=True).rows == (1,)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_pair_lies_in_one_pack_and_counts_by_its_weight(tokenized, packing: str) -> None:
    rows = tokenized([pair(i, words=i, weight=1 + i % 2) for i in range(9)])
    seen: list[int] = []
    steps = [list(loader(rows, dp=2, rank=rank, accumulation=2, packing=packing).steps(0)) for rank in (0, 1)]
    for mine, theirs in zip(*steps, strict=True):
        packs = [*mine.packs, *theirs.packs]
        assert mine.total_weight == theirs.total_weight == sum(p.total_weight for p in packs)
        for pack in packs:
            seen += pack.rows
            assert pack.tokens % 4 == 0
            assert (
                len(pack.cu_seqlens) - 1 - bool(pack.padding_tokens) == 2 * len(pack.rows) == 2 * len(pack.pairs or ())
            )
            assert set(pack.loss_weights[pack.labels != IGNORE_INDEX].tolist()) <= {1.0}
            for i, row in enumerate(pack.rows):
                for side, document in enumerate(rows.documents(row)):
                    a, b = pack.cu_seqlens[2 * i + side], pack.cu_seqlens[2 * i + side + 1]
                    np.testing.assert_array_equal(pack.input_ids[a:b], document.input_ids)
                    assert (pack.labels[a:b] != IGNORE_INDEX).sum() == document.targets
    assert sorted(seen) == list(range(9))


def test_the_budget_is_two_documents(tokenized) -> None:
    rows = tokenized([pair(i) for i in range(4)])
    assert loader(rows).budget_tokens == 512
    assert loader(rows, pack_tokens=700).budget_tokens == 700


def test_sides_of_a_pack(tokenized) -> None:
    rows = tokenized([pair(i) for i in range(3)])
    pack = rows.pack([2, 0], pad_to_multiple=4, pad_id=0)
    for side, half in enumerate(pair_sides(pack, 4)):
        assert half.tokens % 4 == 0
        for i, row in enumerate((2, 0)):
            np.testing.assert_array_equal(
                half.input_ids[half.cu_seqlens[i] : half.cu_seqlens[i + 1]], rows.documents(row)[side].input_ids
            )


def test_reference_goes_with_the_rows_of_a_split(tokenized) -> None:
    rows = tokenized([pair(i) for i in range(10)])
    with_it = rows.with_reference(np.arange(20.0).reshape(10, 2))
    for part in with_it.split(0.3, seed=1):
        for i in range(len(part)):
            number = int(part.row(i).origin.rpartition(":")[2]) - 1
            np.testing.assert_array_equal(
                part.pack([i], pad_to_multiple=1, pad_id=0).pairs.reference, [[2 * number, 2 * number + 1]]
            )


def test_the_wrong_kind_of_rows_is_named(tmp_path: Path, tokenizer) -> None:
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text(json.dumps({"messages": ASK + GOOD}) + "\n")
    pairs.write_text(json.dumps(pair(1)) + "\n")
    data = DataConfig(cache_dir=str(tmp_path / "cache"), workers=1)
    with pytest.raises(DataError, match="set objective to sft"):
        tokenize_sources([SourceConfig(path=str(chats))], tokenizer, data, pairs=True)
    with pytest.raises(DataError, match="set objective to dpo"):
        tokenize_sources([SourceConfig(path=str(pairs))], tokenizer, data)
