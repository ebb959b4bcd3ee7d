"""Lists: each answer is found again in the finished text, lengths are filled, and nothing of RULER's texts is in them."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from ds_longft.cli import main
from ds_longft.data.rows import Turn
from ds_longft.errors import DataError
from ds_longft.tools.evaluate.ruler import texts_of_tasks as ruler
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.lists import TASKS, list_rows
from ds_longft.tools.make_data.synth.row_plan import Wanted
from tests.tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return list(list_rows(Wanted(60, 2000, 1, "lists"), sizes={"1/2": 1, "1": 1}))


def numbers(listed: str, question: str) -> str:
    names = re.findall(r"[A-Z][a-z]{5}", question.removeprefix("Which"))
    lines = [(name, line) for line in listed.splitlines() for name in re.findall(r"\b[A-Z][a-z]{5}\b", line)]
    found = {name: [re.findall(r"\d+", line)[0] for of, line in lines if of == name] for name in names}
    return "; ".join(f"{name}: {', '.join(values)}" for name, values in found.items())


def together(listed: str, question: str) -> str:
    vault = re.findall(r"vault (\d+)", question)[0]
    (start,) = re.findall(rf"(?m)^.*[Vv]ault {vault}\b.*$", listed)
    named = [re.findall(r" ([A-Z][a-z]{5})\b", line) for line in listed.splitlines()]
    behind = {names[1]: names[0] for names in named if len(names) == 2}
    found = re.findall(r" ([A-Z][a-z]{5})\b", start)
    while found[-1] in behind:
        found.append(behind[found[-1]])
    return ", ".join(found)


def most(listed: str, question: str) -> str:
    count = int((re.findall(r"\d+", question) or ["1"])[0])
    found = Counter(re.findall(r"[A-Z][a-z]{5}", listed)).most_common(count + 1)
    assert len({times for _, times in found}) == count + 1, "one right order"
    return ", ".join(name for name, _ in found[:count])


def test_answers_are_found_again_in_the_text(rows: list[dict]) -> None:
    solve = {"keys": numbers, "links": together, "counts": most}
    sizes = set()
    for row in rows:
        (task,), (first, *_) = row["tasks"], row["messages"]
        listed, _, question = first["content"].rpartition("\n\n")
        asked = [question, *(m["content"] for m in row["messages"][2::2])]
        answers = [m["content"] for m in row["messages"][1::2]]
        assert [solve[task](listed, one) for one in asked] == answers
        sizes |= {(task, answer.count(",") + answer.count(";")) for answer in answers}
    assert {task: len([s for t, s in sizes if t == task]) > 3 for task in TASKS} == dict.fromkeys(TASKS, True)


@pytest.mark.parametrize("tokenizer", [None, tiny_tokenizer()])
def test_rows_are_as_long_as_planned_and_the_same_again(tokenizer) -> None:
    lengths = Lengths(tokenizer)
    wanted = Wanted(6, 6000, 3, "n", lengths)
    made = list(list_rows(wanted, sizes={"1": 1}))
    assert made == list(list_rows(wanted, sizes={"1": 1}))
    counted = [lengths.rows([[Turn(m["role"], m["content"]) for m in row["messages"]]])[0] for row in made]
    assert all(5800 < tokens <= 6000 for tokens in counted), counted
    others = list(list_rows(wanted, sizes={"1": 1}, first=6))
    assert not {m["content"] for row in made for m in row["messages"]} & {
        m["content"] for row in others for m in row["messages"]
    }


def test_nothing_of_ruler_is_in_them(rows: list[dict]) -> None:
    """No five words in a row of any of its texts; few of the names are words by chance (potato)."""
    rng = random.Random(0)
    niah = ruler.Niah("needles", keys=4, values=4, queries=4)
    theirs = [niah.text(40, [], rng), ruler.Niah("noise", value_kind="uuids").text(40, [], rng)]
    theirs += [ruler.tracking(40, rng), ruler.common_words(60, 4096, rng), ruler.frequent_words(900, 4096, rng)]
    known = {gram for text in theirs for gram in five_words(f"{text.asked} {text.begins}")}
    ours = [m["content"] for row in rows for m in row["messages"]]
    assert not known & {gram for text in ours for gram in five_words(text)}
    names = {name.lower() for text in ours for name in re.findall(r"\b[A-Z][a-z]{5}\b", text)}
    assert len(names) > 1000
    assert len(names & set(ruler.plain_words())) < len(names) / 500


def five_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lists.jsonl"
    argv = ["data", "synth", "lists", str(out), "--rows", "4", "--context_tokens", "2K", "--json"]
    assert main([*argv, "--tasks", "links,counts", "--sizes", "1/4:1"]) == 0
    assert json.loads(capsys.readouterr().out)["longest_tokens"] <= 512
    assert [json.loads(line)["tasks"] for line in out.read_text().splitlines()] == [["links"], ["counts"]] * 2
    assert main([*argv, "--tasks", "links,songs"]) == 64
    assert "expected tasks among keys, links, counts" in capsys.readouterr().err
    with pytest.raises(DataError, match="give a larger context_tokens"):
        list(list_rows(Wanted(3, 100, 0, "n")))
