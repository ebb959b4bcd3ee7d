"""Published sets, row by row as they lie in their files: columns, quirks and faults."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.formats import detect_format, to_row
from ds_longft.data.preferences import to_preference
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError
from ds_longft.tools.make_data.convert import convert_set

PAPER = "Below is a paper. Memorize the paper and answer my question after the paper.\n The paper begins.\n Attention."


def turns(record):
    row = to_row(record, detect_format(record, "x"), source="x", origin="x:1")
    return [(turn.role[0], turn.content, turn.weight) for turn in row.turns]


def refgpt(dialogue, reference="The comb was bought in 1923.", language="en"):
    return {"dialogue": dialogue, "reference": reference, "language": language, "type": "wiki"}


EN = (
    "<start_chat><Human 1>:(word count: 20 words)When was the comb bought? <Assistant 1>:(word count: 200 words)In 1923. "
    "<Human 2>: Who (of all people) bought it? <Assistant 2>: I cannot tell (yet). <end_chat>"
)
ZH = "<start_chat><Human 1>：（字数要求：20字）梳子是哪年买的？ <Assistant 1>：（字数要求：200字）1923年。<end_chat>"

SETS = {
    "LongAlign-10k": (
        {"messages": [{"role": "user", "content": "A long text.\n\nWhat is it?"}, {"role": "assistant", "content": "\u200bA text\ufeff."},
                      {"role": "user", "content": "And?"}], "length": 9000},
        [("u", "A long text.\n\nWhat is it?", 1), ("a", "A text.", 1)],
    ),
    "LongAlign-10k, an empty answer": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\u200b"},
                      {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}], "length": 9},
        [("u", "q", 1), ("a", "", 0), ("u", "r", 1), ("a", "b", 1)],
    ),
    "LongAlpaca-12k": (
        {"instruction": PAPER, "input": "", "output": "It is about attention.", "file": "1706.03762.txt"},
        [("u", PAPER, 1), ("a", "It is about attention.", 1)],
    ),
    "RefGPT-Fact-v2, English": (
        refgpt(EN),
        [("u", "The comb was bought in 1923.\n\nWhen was the comb bought?", 1), ("a", "In 1923.", 1),
         ("u", "Who (of all people) bought it?", 1), ("a", "I cannot tell (yet).", 1)],
    ),
    "RefGPT-Fact-v2, Chinese": (refgpt(ZH, "梳子购于1923年。", "zh"), [("u", "梳子购于1923年。\n\n梳子是哪年买的？", 1), ("a", "1923年。", 1)]),
    "anti-haystack": (
        {"document": "Paragraph one.\n\nParagraph two.", "question": "Where is two?", "answer": "Paragraph 2"},
        [("u", "Paragraph one.\n\nParagraph two.\n\nWhere is two?", 1), ("a", "Paragraph 2", 1)],
    ),
    "Fusang-v1": (
        {"system_prompt": "Be brief.", "id": None, "idx": None, "source": "airoboros2.2", "hash": None, "views": None,
         "conversations": [{"from": "human", "value": "q", "weight": 0}, {"from": "gpt", "value": "a", "weight": None},
                           {"from": "human", "value": "r", "weight": None}, {"from": "gpt", "value": "b", "weight": 0}],
         "title": None, "language": None, "total_input_tok_len": None},
        [("s", "Be brief.", 1), ("u", "q", 0), ("a", "a", 1), ("u", "r", 1), ("a", "b", 0)],
    ),
    "Fusang-v1, the system prompt as a turn": (
        {"conversations": [{"from": "system", "value": "s", "weight": None}, {"from": "human", "value": "q", "weight": None},
                           {"from": "gpt", "value": "a", "weight": 1.0}], "system_prompt": None, "source": "GPT-4"},
        [("s", "s", 1), ("u", "q", 1), ("a", "a", 1)],
    ),
    "CMRC2018": (
        {"id": "TRIAL_1", "context": "文。", "qas": [{"id": "Q1", "question": "一？", "answers": ["甲", "甲甲"]}, {"question": "二？", "answers": ["乙"]}]},
        [("u", "文。\n\n一？", 1), ("a", "甲", 1), ("u", "二？", 1), ("a", "乙", 1)],
    ),
    "L-Eval": (
        {"context": "A text.", "qas": [{"question": "q", "answer": "a"}], "task": "quality"},
        [("u", "A text.\n\nq", 1), ("a", "a", 1)],
    ),
    "KdConv": (
        {"reference": ["甲｜乙｜丙", "丁｜戊｜己"], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        [("u", "甲｜乙｜丙\n丁｜戊｜己\n\nq", 1), ("a", "a", 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_row_in_its_true_layout(name):
    record, expected = SETS[name]
    assert turns(record) == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (refgpt("<start_chat><Human 1>: q <Assistant 1>: a"), "dialogue without <start_chat> and <end_chat>"),
        (refgpt("<start_chat>Hello <Human 1>: q <Assistant 1>: a<end_chat>"), "dialogue does not begin with <Human 1>"),
        (
            refgpt("<start_chat><Human 1>: q <Assistant 2>: a<end_chat>"),
            "turns of the dialogue are not numbered one by one",
        ),
        (refgpt("<start_chat><Assistant 1>: a <Human 1>: q<end_chat>"), "no answer"),
        (refgpt(EN, reference=" "), "empty reference"),
        (refgpt(EN, reference=None), "reference is null or missing"),
        ({"context": "c", "qas": ["q"]}, "qas holds something that is no object"),
        ({"context": "c", "qas": []}, "qas is empty"),
    ],
)
def test_faults_of_published_rows_are_named(record, reason):
    with pytest.raises(BadRow) as bad:
        turns(record)
    assert bad.value.reason == reason


def message(role, content):
    return {"role": role, "content": content}


Q, GOOD, BAD = message("user", "q"), message("assistant", "good"), message("assistant", "bad")
PAIRS = {
    "orca_dpo_pairs": {"system": "Be kind.", "question": "q", "chosen": "good", "rejected": "bad"},
    "truthy-dpo-v0.1": {"id": "abc", "source": "truthy_dpo", "system": "Be kind.", "prompt": "q", "chosen": "good", "rejected": "bad"},
    "Chinese-dpo-pairs": {"prompt": "q", "system": "Be kind.", "chosen": "good", "rejected": "bad", "source": "zh"},
    "LLaMA-Factory": {
        "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"},
    },
    "the prompt in both answers": {"chosen": [message("system", "Be kind."), Q, GOOD], "rejected": [message("system", "Be kind."), Q, BAD]},
    "our own": {"prompt": [message("system", "Be kind."), Q], "chosen": [GOOD], "rejected": [BAD], "source": "x", "weight": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_every_set_of_pairs_becomes_one_row_type(name):
    row = to_preference(PAIRS[name], source="x", origin="x:1")
    assert [[(turn.role, turn.content) for turn in part] for part in (row.prompt, row.chosen, row.rejected)] == [
        [("system", "Be kind."), ("user", "q")],
        [("assistant", "good")],
        [("assistant", "bad")],
    ]


def test_ultrafeedback_repeats_its_prompt_in_both_lists():
    record = {
        "source": "evol_instruct", "prompt": "q", "chosen": [Q, GOOD], "chosen-rating": 4.75, "rejected": [Q, BAD],
        "chosen-model": "a", "rejected-rating": 3.0, "rejected-model": "b",
    }  # fmt: skip
    row = to_preference(record, source="x", origin="x:1")
    assert (len(row.prompt), row.chosen[0].content, row.rejected[0].content) == (1, "good", "bad")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected holds an empty message"),
        ({"prompt": "q", "chosen": [Q], "rejected": [Q, BAD]}, "chosen is empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen is not a string"),
        ({"prompt": [Q, GOOD], "chosen": "a", "rejected": "b"}, "wrong role order in the prompt"),
        ({"prompt": "q", "chosen": [GOOD, Q], "rejected": "b"}, "wrong role order in chosen"),
        ({"system": "s", "chosen": "a", "rejected": "b"}, "no prompt"),
    ],
)
def test_faults_of_pairs_are_named(record, reason):
    with pytest.raises(BadRow) as bad:
        to_preference(record, source="x", origin="x:1")
    assert bad.value.reason == reason


def converted(tmp_path, rows, suffix=".jsonl", **more):
    path = tmp_path / f"set{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(text) if suffix == ".jsonl.gz" else text)
    done = convert_set(
        SourceConfig(path=str(path)), tmp_path / "out.jsonl", name="set", **{"max_bad_fraction": 0.5, **more}
    )
    return done, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_convert_keeps_weights_and_names_source_and_language(tmp_path, suffix):
    rows = [SETS["Fusang-v1"][0], SETS["Fusang-v1, the system prompt as a turn"][0]]
    done, made = converted(tmp_path, rows, suffix)
    assert (done.format, done.tally.usable) == ("sharegpt", 2)
    first = made[0]
    assert [m.get("weight") for m in first["messages"]] == [None, None, None, None, 0]
    assert (first["source"], first["part"]) == ("set", "airoboros2.2")
    assert [turn[1] for turn in turns(first)] == ["Be brief.", "q", "a", "r", "b"], "it reads back as it was"


def test_convert_detects_languages_where_none_is_named(tmp_path):
    rows = [
        {"text": "话说天下大势，分久必合，合久必分。"},
        {"text": "It was the best of times, it was the worst of times."},
    ]
    rows += [{"text": "C'était le meilleur des temps, c'était le pire des temps.", "lang": "fr-FR"}, {"text": "12 34"}]
    done, made = converted(tmp_path, rows)
    assert [row["language"] for row in made] == ["zh", "en", "fr", "und"]
    assert done.languages == {"zh": 1, "en": 1, "fr": 1, "und": 1}


def test_convert_writes_pairs_as_they_are_agreed(tmp_path):
    done, made = converted(tmp_path, [PAIRS["orca_dpo_pairs"], {**PAIRS["orca_dpo_pairs"], "chosen": ""}])
    assert done.format == "preference"
    assert made == [
        {
            "prompt": [message("system", "Be kind."), Q],
            "chosen": [GOOD],
            "rejected": [BAD],
            "source": "set",
            "language": "und",
        }
    ]


def test_convert_with_too_many_bad_rows_leaves_the_old_file_and_a_ledger(tmp_path):
    converted(tmp_path, [{"text": "one"}])
    with pytest.raises(DataError, match=r"1 of 2 rows.*out\.jsonl\.ledger\.jsonl"):
        converted(tmp_path, [{"text": "two"}, {"text": ""}], max_bad_fraction=0.1)
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == "one"
    assert json.loads((tmp_path / "out.jsonl.ledger.jsonl").read_text())["reason"] == "empty text"
    assert not list(tmp_path.glob(".*"))


def test_convert_counts_repeated_ids_apart_and_still_refuses_many(tmp_path):
    rows = [{"id": i, "text": text} for i, text in [(1, ""), (1, "one"), (2, "two"), (2, "again"), (2, "thrice")]]
    done, made = converted(tmp_path, rows, max_bad_fraction=0.6)
    assert [row["text"] for row in made] == ["one", "two"], "a row that is not used does not take the id of a later one"
    assert (done.tally.bad, done.tally.repeated) == ({"empty text": 1}, 2)
    with pytest.raises(DataError, match=r"(?s)3 of 5 rows.*2 x repeated id, first .*set\.jsonl:4 \(2\).*column `id`"):
        converted(tmp_path, rows, max_bad_fraction=0.5)


def test_a_hub_set_whose_split_became_a_configuration(monkeypatch):
    import datasets

    from ds_longft.data.readers import read_rows

    asked = []

    def load(path, name=None, split=None):
        asked.append((name, split))
        if name is None:
            raise ValueError('Unknown split "long". Should be one of ["train"].')
        return datasets.Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["base", "long"])
    rows = list(read_rows(SourceConfig(path="some/fusang", split="long")))
    assert rows == [("some/fusang[long]:1", {"text": "one"})]
    assert asked == [(None, "long"), ("long", "train")]
    with pytest.raises(DataError, match="split 'longer'"):
        list(read_rows(SourceConfig(path="some/fusang", split="longer")))
