"""RULER: the texts and scores of lm-eval's implementation, prompts that fill their length, the command."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds_longft.cli import main
from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.evaluation import mean_with_interval
from ds_longft.tools.evaluate.haystack import encode_prompt
from ds_longft.tools.evaluate.ruler import texts_of_tasks
from ds_longft.tools.evaluate.ruler.ruler_rows import (
    ANSWER_TOKENS,
    NIAH,
    OWN,
    Material,
    answer_tokens,
    choose,
    made_row,
    read_material,
    score,
)
from ds_longft.tools.evaluate.ruler.texts_of_tasks import (
    Pairs,
    common_words,
    frequent_words,
    plain_words,
    question_answering,
    tracking,
    with_example,
)
from ds_longft.tools.evaluate.texts import english
from tests.peers import lm_eval_ruler
from tests.tokenizer import tiny_tokenizer

ROWS = 50
ESSAY = english(0)[:60_000].split()
CHARACTERS: Callable[[str], Any] = lambda text: type("Encoded", (), {"input_ids": text})  # noqa: E731 - a token each


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> Pairs:
    """The stand-in's hundred nouns and adjectives, in lm-eval's order and in ours."""
    prepare = lm_eval_ruler("prepare_niah")
    pairs = Pairs(sorted(prepare.adjs), sorted(prepare.nouns))
    monkeypatch.setattr(Pairs, "of_package", lambda: pairs)
    monkeypatch.setattr(prepare, "WORDS", pairs)
    return pairs


@pytest.mark.parametrize("task", NIAH)
def test_needles_as_lm_eval_hides_them(task: str, few_pairs: Pairs) -> None:
    prepare, templates = lm_eval_ruler("prepare_niah"), lm_eval_ruler("niah_utils")
    niah = NIAH[task]
    kinds = {"noise": "repeat", "essay": "essay", "needles": "needle"}
    hay = {"essay": ESSAY, "noise": texts_of_tasks.NOISE, "needles": prepare.NEEDLE}[niah.hay]
    for row in range(ROWS):
        units = 40 + 7 * row
        random.seed(row)
        text, answers, query = prepare.generate_input_output(
            units,
            hay,
            type_haystack=kinds[niah.hay],
            num_needle_k=max(niah.keys, niah.queries),
            type_needle_k=niah.key_kind,
            num_needle_v=niah.values,
            type_needle_v=niah.value_kind,
            template=templates.TEMPLATE,
            num_needle_q=niah.queries,
        )
        ours = niah.text(units, ESSAY, random.Random(row))
        assert ours.asked == text
        assert list(ours.wanted) == answers
        one = niah.queries * niah.values == 1
        begins = (
            f"The special magic {niah.value_kind[: -1 if one else None]} for {query} mentioned in the provided text"
        )
        assert ours.begins == begins + (" is" if one else " are")


def test_variable_tracking_as_lm_eval_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = lm_eval_ruler("vt_utils")
    monkeypatch.setattr(module.np.random, "randint", random.randrange)
    for row in range(100, 100 + ROWS):  # seeds that draw no name twice, of which it makes no row
        random.seed(row)
        example, answers = module.generate_input_output(6 + row, 1, 4, is_icl=True)
        theirs = module.generate_input_output(20 + row, 1, 4)
        shown = module.randomize_icl(f"{example} {' '.join(answers)}\n\n")
        asked, begins = theirs[0].split(" Answer: ")
        rng = random.Random(row)
        shorter, ours = tracking(6 + row, rng, letters=3), tracking(20 + row, rng)
        assert f"{shorter.asked} {shorter.begins}" == example
        whole = with_example(shorter, ours, rng)
        assert whole.asked == f"{shown}\n\n{asked}"
        assert whole.begins == f"Answer: {begins}"
        assert list(whole.wanted) == theirs[1]


def test_common_words_as_lm_eval_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module = lm_eval_ruler("cwe_utils")
    monkeypatch.setattr(module, "RNG", random)
    assert plain_words() == module.WORDS
    for row in range(ROWS):
        length = (2048, 8192)[row % 2]
        random.seed(row)
        example, text, answers = module.generate_input_output(30 + row, length)
        ours = common_words(30 + row, length, random.Random(row))
        assert f"{ours.asked} {ours.begins}" == f"{example}\n{text}", "as published: behind an example"
        assert list(ours.wanted) == answers


def test_frequent_words_as_lm_eval_codes_them() -> None:
    module = lm_eval_ruler("fwe_utils")
    for row in range(ROWS):
        random.seed(row)
        text, answers, units = module.generate_input_output(20_000, CHARACTERS, num_words=500 + row, vocab_size=81)
        ours = frequent_words(units, 4096, random.Random(row))
        assert f"{ours.asked} {ours.begins}" == text
        assert list(ours.wanted) == answers


def test_questions_about_documents_as_lm_eval_asks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = lm_eval_ruler("qa_utils")
    files = sets(tmp_path)
    monkeypatch.setattr(module, "download_json", lambda file: json.loads(Path(file).read_text()))
    material = read_material(tiny_tokenizer(), ESSAY, files, list(files))
    for task, reader in (("qa_1", module.read_squad), ("qa_2", module.read_hotpotqa)):
        qas, documents = reader(files[task])
        assert documents == material.documents[task]
        assert [q["query"] for q in qas] == [q.query for q in material.questions[task]]
        for row, question in enumerate(material.questions[task]):
            for units in (2, 4, 9, len(documents)):
                random.seed(row)
                asked, answers = module.generate_input_output(row, units, qas=qas, docs=list(documents))
                ours = question_answering(question, documents, units, random.Random(row))
                assert (ours.asked, list(ours.wanted)) == (asked, answers)


def test_scores_are_lm_evals() -> None:
    module = lm_eval_ruler("common_utils")
    rng = random.Random(0)
    for task in ANSWER_TOKENS:
        for _ in range(ROWS):
            wanted = [f"Word{rng.randrange(30)}" for _ in range(rng.choice([1, 4]) if "qa" not in task else 1)]
            reply = " ".join(rng.choices([*wanted, "word", "\n", "\x07", "WORD3"], k=6))
            judge = module.process_results_part if "qa" in task else module.process_results
            theirs = judge({"max_length": 4096, "outputs": wanted}, [reply])["4096"]
            assert score(task, wanted, reply) == theirs
    # Of several answers one is enough, as published; lm-eval takes their share.
    assert score("qa_1", ["Denver", "the Broncos"], "denver.") == 1
    assert module.string_match_part(["denver."], [["Denver", "the Broncos"]]) == 0.5


@pytest.mark.parametrize("task", [*(t for t in ANSWER_TOKENS if t not in OWN), *OWN.values()])
def test_prompts_fill_their_length_and_hold_the_answers(task: str) -> None:
    tokenizer = tiny_tokenizer()
    material = read_material(tokenizer, [" ".join(ESSAY)], {}, [task])
    for length, row in ((8192, 0), (8192, 1), (20_000, 0)):
        text, ids = made_row(tokenizer, material, task, length, row, 42)
        assert ids == encode_prompt(tokenizer, text.asked, begins=text.begins.strip())
        room = length - answer_tokens(task) - len(ids)
        largest_unit = {"own_qa_1": 600, "own_qa_2": 600, "cwe": 60, "fwe": 60}.get(task, 120)
        assert 0 <= room < largest_unit, f"{room} tokens are left"
        assert all(answer in text.asked for answer in text.wanted)
        assert made_row(tokenizer, material, task, length, row, 42) == (text, ids)
    assert made_row(tokenizer, material, task, 8192, 0, 43)[0] != made_row(tokenizer, material, task, 8192, 0, 42)[0]
    with pytest.raises(ConfigError, match=f"--lengths: 300 tokens are too few for {task}"):
        made_row(tokenizer, material, task, 300, 0, 42)


def test_documents_made_here_tell_the_answer_once() -> None:
    material = Material([f"word{i}" for i in range(5000)], {}, {})
    for task, golds in (("own_qa_1", 1), ("own_qa_2", 2)):
        text = material.text(task, 12, 4096, 3, random.Random(1))
        assert text.asked.count("Document ") == 12
        assert text.asked.count(text.wanted[0]) == 1
        documents = text.asked.partition("given documents.\n\n")[2].rpartition("\n\nAnswer")[0].split("Document ")[1:]
        assert sum(". word" in document for document in documents) == golds, "a sentence ends only there"


def test_which_tasks() -> None:
    files = {"qa_1": "squad.json", "qa_2": None}
    assert choose("all", files) == [*NIAH, "vt", "cwe", "fwe", "qa_1", "own_qa_2"]
    assert choose("cwe,vt", files) == ["vt", "cwe"]
    with pytest.raises(ConfigError, match=r"no task 'qa_2'.*with --hotpotqa"):
        choose("qa_2", files)
    with pytest.raises(ConfigError, match="no task ''"):
        choose("", files)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    (tmp_path / "garbage.json").write_text("{")
    with pytest.raises(DataError, match="no SQuAD file"):
        read_material(tiny_tokenizer(), ESSAY, {"qa_1": str(tmp_path / "other.json")}, ["qa_1"])
    with pytest.raises(DataError, match="no HotpotQA file"):
        read_material(tiny_tokenizer(), ESSAY, {"qa_2": str(tmp_path / "other.json")}, ["qa_2"])
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_material(tiny_tokenizer(), ESSAY, {"qa_1": str(tmp_path / "garbage.json")}, ["qa_1"])


def test_intervals_cover_what_they_should() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(200):
        groups = [[float(rng.random() < chance) for _ in range(40)] for chance in (0.2, 0.5, 0.9)]
        mean, low, high = mean_with_interval(groups)
        assert mean == pytest.approx(sum(sum(g) / 40 for g in groups) / 3, abs=1e-4)
        covered += low <= (0.2 + 0.5 + 0.9) / 3 <= high
    assert 180 <= covered <= 199
    assert mean_with_interval([[1.0, 1.0]]) == [1.0, 1.0, 1.0]
    one_each = [[float(i % 2)] for i in range(40)]
    assert mean_with_interval(one_each) == mean_with_interval([[x for (x,) in one_each]])
    assert mean_with_interval(one_each)[1] < 0.4, "no width at all would say that it is known"


def test_the_command_goes_on_where_it_was(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_folder, tmp_path / "eval"
    argv = [
        "eval",
        "ruler",
        str(model),
        "--lengths",
        "2K",
        "--tasks",
        "vt,fwe,own_qa_1",
        "--rows",
        "2",
        "--out",
        str(out),
    ]
    assert main([*argv, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["rows_made_now"] == 6
    assert first["averages"] == {"2048": 0.0}, "random weights"
    assert first["by_length"].keys() == {"vt", "fwe", "own_qa_1"}
    lines = (out / "ruler.rows.jsonl").read_text().splitlines()
    (out / "ruler.rows.jsonl").write_text("\n".join(lines[:4]) + "\n")
    assert main(argv) == 0
    assert "mean" in capsys.readouterr().out
    assert (out / "ruler.rows.jsonl").read_text().splitlines() == lines
    assert main(["eval", "ruler", str(model), "--rows", "0"]) == 64
    assert "--rows is 0" in capsys.readouterr().err


def sets(folder: Path) -> dict[str, str]:
    """Small files of SQuAD's and HotpotQA's shape."""
    articles = [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {p} of article {a}.",
                    "qas": [
                        {"question": f"Which {a}.{p}?", "answers": [{"text": f"{p}"}, {"text": f"Paragraph {p}"}],
                         "is_impossible": p == 1}
                    ],
                }
                for p in range(4)
            ]
        }
        for a in range(4)
    ]  # fmt: skip
    rows = [
        {
            "question": f"Who {i}?",
            "answer": f"person {i}",
            "context": [[f"Title {i + k}", [f"Line {i + k}. ", "Another."]] for k in range(2)],
        }
        for i in range(12)
    ]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    (folder / "hotpot.json").write_text(json.dumps(rows))
    return {"qa_1": str(folder / "squad.json"), "qa_2": str(folder / "hotpot.json")}
