import random
import re
from collections import Counter

import pytest

from ds_longft.data.rows import Turn
from ds_longft.errors import DataError
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.needle_rows import needle_rows, paragraphs_of
from ds_longft.tools.make_data.synth.needle_tasks import TASKS, WORDINGS, ask, numbered, solve
from ds_longft.tools.make_data.synth.row_plan import Wanted
from ds_longft.tools.make_data.synth.sources import Document
from tests.unit.tools.make_data.texts import chinese, english


@pytest.fixture(scope="module")
def documents():
    made = [Document(english(200, seed), "en", f"en{seed}") for seed in range(4)]
    made += [Document(chinese(150, seed), "zh", f"zh{seed}") for seed in range(4)]
    return [*made, Document("un texte français", "fr", "fr0")]


@pytest.fixture(scope="module")
def rows(documents):
    return list(needle_rows(documents, Wanted(60, 3000, 0, "n"), questions=4))


def split(row):
    """(numbered text, [(question, answer)]) of a row."""
    contents = [m["content"] for m in row["messages"]]
    context, _, first = contents[0].rpartition("\n\n")
    return context, list(zip([first, *contents[2::2]], contents[1::2], strict=True))


def test_rows_are_of_every_task_and_language_and_fit(rows):
    assert {task for row in rows for task in row["tasks"]} == set(TASKS)
    assert {row["language"] for row in rows} == {"en", "zh"}
    for row in rows:
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * len(row["tasks"])
        turns = [Turn("user", m["content"]) for m in row["messages"]]
        assert 400 < Lengths().rows([turns])[0] <= 3000


def test_answers_hold_by_a_second_independent_reading(rows):
    """Not by `solve`: plain searches over the text, one for each task."""
    checked = Counter()
    for row in rows:
        context, asked = split(row)
        paragraphs = dict(re.findall(r"^\[(\d+)\] (.*)$", context, re.MULTILINE))
        english_row = row["language"] == "en"
        for task, (question, answer) in zip(row["tasks"], asked, strict=True):
            quoted = re.search(r'"(.*)"|“(.*)”', question)
            head = (quoted[1] or quoted[2]) if quoted else ""
            if task == "recall":
                assert context.count(head) == 1
                assert re.sub(r"\s", "", head + answer) in re.sub(r"\s", "", context)
                assert answer[-1] in ".!?。！？；"
            elif task == "location":
                assert [n for n, text in paragraphs.items() if head in text] == re.findall(r"\d+", answer)
            elif task == "count":
                assert sum(head in text for text in paragraphs.values()) == int(answer) >= 2
            elif task == "absent":
                assert head not in context
                assert answer == ("It is not in the text." if english_row else "文中没有。")
            else:
                pattern = (
                    r"Note: (.+?) handed the (.+?) to (.+?)\." if english_row else r"附记：(.+?)把(.+?)交给了(.+?)。"
                )
                notes = re.findall(pattern, context)
                notes = notes if english_row else [(a, b, c) for a, b, c in notes]
                thing = next(t for t in WORDINGS[row["language"]].things if t in question)
                of_thing = [(giver, taker) for giver, what, taker in notes if what == thing]
                assert 2 <= len(of_thing) <= 4
                assert len(notes) == 2 * len(of_thing), "as many notes lead astray"
                givers, takers = {g for g, _ in of_thing}, {t for _, t in of_thing}
                assert (givers - takers).pop() in question
                assert takers - givers == {answer}
            checked[task] += 1
    assert min(checked.values()) >= 10


def test_a_wrong_answer_or_a_changed_text_is_noticed(rows):
    for row in rows[:20]:
        context, asked = split(row)
        for task, (question, answer) in zip(row["tasks"], asked, strict=True):
            assert solve(context, question, row["language"]) == answer
            if task in ("recall", "location"):
                assert solve("[1] Another text.", question, row["language"]) != answer
            if task == "absent":
                head = re.search(r'"(.*)"|“(.*)”', question)
                now_there = f"{head[1]} is here." if head[1] else f"{head[2]}在此。"
                assert solve(f"{context}\n[999] {now_there}", question, row["language"]) != answer
    assert solve("[1] text", "What is the weather?", "en") is None


def test_the_seed_decides(documents, rows):
    assert list(needle_rows(documents, Wanted(60, 3000, 0, "n"), questions=4)) == rows
    assert list(needle_rows(documents, Wanted(5, 3000, 1, "n"), questions=4)) != rows[:5]


def test_only_the_tasks_that_were_asked_for(documents):
    made = list(needle_rows(documents, Wanted(5, 2000, 0, "n"), tasks=["location"]))
    assert {task for row in made for task in row["tasks"]} == {"location"}


def test_texts_too_short_or_in_other_languages_are_an_error(documents):
    with pytest.raises(DataError, match="no English or Chinese text"):
        next(needle_rows(documents[-1:], Wanted(1, 2000, 0, "n")))
    with pytest.raises(DataError, match="no needle question of at most 300 tokens"):
        next(needle_rows(documents, Wanted(1, 300, 0, "n")))


def test_wrapped_lines_become_paragraphs():
    assert paragraphs_of("青山依旧在，\n几度夕阳红。\n\n" * 20, "zh")[0].startswith("青山依旧在，几度夕阳红。")
    assert all(400 <= len(p) < 600 for p in paragraphs_of(english(40, 0), "en")[:-1])
    assert paragraphs_of(" \n\n", "en") == []


def test_tasks_that_find_nothing_to_ask_say_so():
    rng = random.Random(0)
    assert [ask(task, ["x", "y"], ["z"], "en", rng) for task in TASKS] == [None] * 5
    assert numbered(["a", "b"]) == "[1] a\n[2] b"
