"""Like requests, walks, letters, and facts asked for in other words: what is asked, and how it is scored."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_longft.cli import main
from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.longbench.choices import COLUMNS, LETTERS, lettered
from ds_longft.tools.evaluate.needle_facts import UNLIKE, make_needle
from ds_longft.tools.evaluate.reason import coreference, f1, filled, likeness, walks
from tests.peers import lm_eval_choices, lm_eval_graphwalks
from tests.tokenizer import tiny_tokenizer


def test_the_second_of_like_answers_is_wanted() -> None:
    tokenizer = tiny_tokenizer()
    ids, (wanted,), judge = coreference(tokenizer, "0", 40)
    text = tokenizer.decode(ids)
    code, form, topic = re.search(r"Put (\w+) in front of the second ([\w ]+) about ([\w ]+), and", text).groups()  # type: ignore[union-attr]
    answers = re.findall(
        rf"Write a {form} about {topic}\.<\|im_end\|>\s*<\|im_start\|>assistant\s*(.*?)<\|im_end\|>", text
    )
    assert len(answers) == 4
    assert wanted == f"{code} {answers[1]}"
    assert [judge(wanted), judge(answers[1]), judge(f" {wanted}\n")] == [1.0, 0.0, 1.0]
    assert 0 < judge(f"{code} {answers[0]}") < 1
    assert likeness("k1 abcd", "k1 abxx", "k1") == 0.5


def test_nodes_two_steps_away() -> None:
    tokenizer = tiny_tokenizer()
    ids, wanted, judge = walks(tokenizer, "0", 60)
    text = tokenizer.decode(ids)
    edges = re.findall(r"(\w{6}) -> (\w{6})", text)
    start = re.search(r"steps away from (\w{6})", text)[1]  # type: ignore[index]
    near = {b for a, b in edges if a == start}
    assert set(wanted) == {b for a, b in edges if a in near} - near - {start}
    assert (len(edges), len(set(edges))) == (60, 60)
    assert judge(", ".join(wanted)) == 1.0
    assert f1(["a", "b"], ["b", "c", "b"]) == 0.5
    assert f1([], []) == 1.0


@pytest.mark.parametrize("task", ["coreference", "walks"])
@pytest.mark.parametrize("tokens", [5000, 9001])
def test_lengths_are_filled_and_not_exceeded(task, tokens: int) -> None:
    ids, wanted, _ = filled(task, tiny_tokenizer(), "7", tokens)
    assert 0.95 * tokens - 200 < len(ids) <= tokens
    assert filled(task, tiny_tokenizer(), "7", tokens)[:2] == (ids, wanted)
    with pytest.raises(ConfigError, match=f"--lengths: 200 tokens are too few for {task}"):
        filled(task, tiny_tokenizer(), "7", 200)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_fact_and_its_question_share_no_word(language) -> None:
    statement, question = UNLIKE[language]
    if language == "en":
        every = {"the", "in", "a", "and", "at", "of", "to"}
        said, asked = (set(re.findall(r"[a-z]+", text.lower())) - every for text in (statement, question))
    else:
        said, asked = (set(re.findall("[\u4e00-\u9fff]{2}", text)) for text in (statement, question))
    assert not said & asked
    needle = make_needle("meaning", language, 6, random.Random(1))
    (value,) = needle.answers
    (holds,) = [sentence for sentence in needle.sentences if value in sentence]
    assert len(set(needle.sentences)) == 6
    city = needle.question.split("home in ")[1].split("?")[0] if language == "en" else ""
    assert not city or city not in holds


ROW = {
    "_id": "a1", "domain": "x", "sub_domain": "y", "difficulty": "easy", "length": "short", "question": "Which?",
    "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four", "answer": "C", "context": "x = 1\n" * 400,
}  # fmt: skip


def test_letters_by_their_likelihood(
    tiny_folder: Path, tmp_path: Path, on_two_ranks: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([ROW, {**ROW, "_id": "a2", "difficulty": "hard", "context": "short"}]))
    tokenizer = tiny_tokenizer()
    prompts = [lettered(tokenizer, row, 300) for row in json.loads(data.read_text())]
    for ids, letters in prompts:
        assert tokenizer.decode(ids).endswith("The correct answer is (")
        assert [tokenizer.decode([letter]) for letter in letters] == list(LETTERS)
        assert len(ids) < 400
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    with torch.no_grad():
        wanted = [plain(torch.tensor([ids])).logits[0, -1, letters].softmax(-1) for ids, letters in prompts]
    argv = ["eval", "longbench", "v2", str(tiny_folder), str(data), "--max_length", "300", "--json"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    on_two_ranks([*argv, "--out", str(tmp_path / "two"), "--sp", "2"])
    for name in ("one", "two"):
        rows = [json.loads(line) for line in (tmp_path / name / "longbench-v2.rows.jsonl").read_text().splitlines()[1:]]
        for row, shares in zip(rows, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(row["letters"]), shares, atol=2e-4, rtol=0)
            assert row["reply"] == LETTERS[int(shares.argmax())]
    result = json.loads((tmp_path / "one" / "longbench-v2.json").read_text())
    assert {name: found[3] for name, found in result["right_percent"].items()} == {
        "all": 2,
        "easy": 1,
        "short": 2,
        "hard": 1,
    }
    data.write_text(json.dumps([{"_id": "a"}]))
    capsys.readouterr()
    assert main([*argv, "--out", str(tmp_path / "three")]) == 64
    assert f"has no {', '.join(COLUMNS[1:])}" in capsys.readouterr().err


@pytest.mark.slow
def test_letters_of_fifty_rows_are_lm_evals(tiny_folder: Path, tmp_path: Path) -> None:
    """Its model gives each letter behind our prompt the likelihood that ours does, and its task the same row the point."""
    likelihoods, task, prompt = lm_eval_choices()
    rng, words = random.Random(0), ["maple", "river", "stone", "lamp", "harbour", "seven", "green", "letter"]
    some = partial(rng.choices, words)
    rows = [
        {**ROW, "_id": str(i), "question": f"{' '.join(some(k=4))}?", "answer": rng.choice(LETTERS), "context": " ".join(some(k=30)),
         **{f"choice_{letter}": " ".join(some(k=3)) for letter in LETTERS}}
        for i in range(50)
    ]  # fmt: skip
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    assert main(["eval", "longbench", "v2", str(tiny_folder), str(data), "--out", str(tmp_path)]) == 0
    ours = [json.loads(line) for line in (tmp_path / "longbench-v2.rows.jsonl").read_text().splitlines()[1:]]
    tokenizer = tiny_tokenizer()
    theirs = likelihoods(
        pretrained=AutoModelForCausalLM.from_pretrained(tiny_folder), tokenizer=tokenizer, max_length=4096
    )
    scored = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice", _metric_fn_list={"acc": None}, multiple_input=0, multiple_target=0,
        config=SimpleNamespace(process_results=None),
        doc_to_choice=lambda row: list(LETTERS), doc_to_target=lambda row: row["answer"],
    )  # fmt: skip
    before = jinja2.Template(prompt.rpartition("Answer:")[0], keep_trailing_newline=True)
    for row, mine in zip(rows, ours, strict=True):
        ids, _ = lettered(tokenizer, row, 4000)
        text = tokenizer.decode(ids)
        assert theirs.tok_encode(text) == ids
        assert before.render(**row, choices=[row[f"choice_{letter}"] for letter in LETTERS]) in text
        found = theirs.loglikelihood([SimpleNamespace(args=(text, letter)) for letter in LETTERS], disable_tqdm=True)
        shares = torch.tensor([likelihood for likelihood, _ in found]).softmax(-1)
        torch.testing.assert_close(torch.tensor(mine["letters"]), shares, atol=2e-4, rtol=0)
        assert task.process_results(scored, row, found)["acc"] == (mine["reply"] == row["answer"])
    assert len({mine["reply"] for mine in ours}) > 1


def test_walks_of_fifty_rows_are_scored_as_by_lm_eval() -> None:
    judge, rng, scores = lm_eval_graphwalks().process_results, random.Random(0), set()
    for i in range(50):
        _, wanted, ours = walks(tiny_tokenizer(), str(i), 24)
        others = [f"{rng.randrange(16**5, 16**6):06x}" for _ in range(3)]
        said = rng.sample(wanted, rng.randrange(len(wanted) + 1)) + rng.sample(others, rng.randrange(4))
        reply = f"Final Answer: [{', '.join(said)}]"
        assert ours(reply) == pytest.approx(judge({"answer_nodes": wanted}, [reply])["f1"])
        scores.add(ours(reply))
    assert len(scores) > 3


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "reason", str(tiny_folder), "--lengths", "4K", "--rows", "2"]
    assert main([*argv, "--out", str(tmp_path / "eval"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["by_length"] == {task: {"4096": [0.0, 0.0, 0.0]} for task in ("coreference", "walks")}
    assert result["rows_made_now"] == 4
    assert main([*argv, "--tasks", "songs"]) == 64
    assert "--tasks is 'songs'" in capsys.readouterr().err
