import json

import numpy as np
import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.ledger import Ledger
from ds_longft.data.rows import Turn
from ds_longft.errors import DataError, LongftError
from ds_longft.tools.make_data.synth.refgpt8x import hide_references, nearest, sentence_embedder
from ds_longft.tools.make_data.synth.sources import Dialogue, read_dialogues, read_documents

TOPICS = {"en": ["copper mines of the north", "sailing ships and harbours", "bees in an orchard"],
          "zh": ["北方的铜矿与矿工", "帆船与港口的历史", "果园里的蜜蜂与花"]}  # fmt: skip


def dialogues(per_topic=12):
    made = []
    for language, topics in TOPICS.items():
        for topic in topics:
            for i in range(per_topic):
                reference = f"{topic}, {i}. " + (f"{topic} {topic[: i + 3]}。" * 3)
                turns = (Turn("user", f"q{topic}{i}"), Turn("assistant", f"a{i}"))
                made.append(Dialogue(reference, turns, language, f"{language}-{topic}-{i}"))
    return made


def test_the_true_reference_stands_among_near_ones_of_its_language():
    source = dialogues()
    of = {d.turns[0].content: d for d in source}
    rows = list(hide_references(source, rows=40, seed=0, name="r"))
    assert len({row["id"] for row in rows}) == 40
    same_topic = []
    for row in rows:
        *references, question = row["messages"][0]["content"].split("\n\n")
        dialogue = of[question]
        assert references[row["true_reference"] - 1] == dialogue.text
        assert len(references) == len(set(references)) == row["references"]
        assert all(d.language == row["language"] for d in source if d.text in references)
        assert [m["content"] for m in row["messages"][1:]] == [t.content for t in dialogue.turns[1:]]
        topic = dialogue.text.split(",")[0]
        same_topic += [ref.startswith(topic) for ref in references]
    assert np.mean(same_topic) > 0.9, "neighbours are about the same thing"
    assert 6 < np.mean([row["references"] for row in rows]) < 10
    places = [row["true_reference"] / row["references"] for row in rows]
    assert 0.3 < np.mean(places) < 0.8
    assert rows == list(hide_references(source, rows=40, seed=0, name="r"))
    assert rows != list(hide_references(source, rows=40, seed=1, name="r"))


def test_the_same_reference_twice_is_no_neighbour_of_itself():
    twice = [Dialogue("one text", (Turn("user", q), Turn("assistant", "a")), "en", q) for q in "ab"]
    rows = list(hide_references([*twice, *dialogues(1)], rows=8, seed=0, name="r", mean_references=50))
    assert all(row["messages"][0]["content"].count("one text") <= 1 for row in rows)
    assert {row["references"] for row in rows} == {3, 4}, "all there are"


def test_an_embedding_may_decide_what_is_near():
    texts = ["a", "b", "c", "d"]
    place = {"a": [1, 0.0], "b": [0.9, 0.1], "c": [0, 1.0], "d": [0.1, 0.9]}
    near = nearest(texts, [0, 3], 1, lambda found: np.asarray([place[t] for t in found]))
    assert near.tolist() == [[1], [2]]
    assert nearest(texts[:1], [0], 5, None).shape == (1, 0)


def test_more_rows_than_dialogues_are_refused_and_missing_libraries_named(monkeypatch):
    with pytest.raises(DataError, match="9 rows were asked for, but there are 6"):
        next(hide_references(dialogues(1), rows=9, seed=0, name="r"))
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(LongftError, match=r"sentence_transformers: pip install 'ds-longft\[embed\]'"):
        sentence_embedder("any")


def test_sources_are_read_with_a_ledger(tmp_path):
    rows = [
        {"reference": "r", "dialogue": "<start_chat><Human 1>: q <Assistant 1>: a<end_chat>", "language": "en"},
        {"reference": "r", "dialogue": "cut off"},
        {
            "reference": "r",
            "dialogue": "<start_chat><Human 1>: q <Assistant 1>: a <Human 2>: r <end_chat>",
            "language": "zh",
        },
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = SourceConfig(path=str(tmp_path / "a.jsonl"))
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        found = read_dialogues(config, ledger)
        bad = dict(ledger.tally.bad)
        assert [d.text for d in read_documents(config, ledger)] == ["r", "r"]
    assert [(d.text, len(d.turns), d.language, d.id) for d in found] == [
        ("r", 2, "en", "a.jsonl:1"),
        ("r", 2, "zh", "a.jsonl:3"),
    ]
    assert bad == {"dialogue without <start_chat> and <end_chat>": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": []}))
    with pytest.raises(DataError, match="has no references"):
        read_dialogues(config, ledger)
    with pytest.raises(DataError, match="holds messages rows, expected plain text"):
        read_documents(config, ledger)
