import pytest

from ds_longft.data.rows import Turn
from ds_longft.errors import DataError
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.code import CHARS_PER_TOKEN, code_rows, module_names, read_module
from ds_longft.tools.make_data.synth.row_plan import Wanted


def make(rows, context_tokens, *, tokenizer=None, questions=1, seed=0, part="train"):
    wanted = Wanted(rows, context_tokens, seed, "c", Lengths(tokenizer, CHARS_PER_TOKEN))
    return list(code_rows(wanted, questions=questions, part=part))


def test_rows_fit_exactly_and_answers_stand_in_the_context(tokenizer):
    lengths, questions = [], set()
    for row in make(12, 6000, seed=3, tokenizer=tokenizer):
        question, answer = (message["content"] for message in row["messages"])
        assert answer in question
        assert row["topics"] in question.splitlines()[-1]
        assert question.count(f"def {row['topics']}(") == 1
        assert answer.count("\n") < 30
        assert len(answer) > 20
        turns = [Turn("user", question), Turn("assistant", answer)]
        lengths += Lengths(tokenizer).rows([turns])
        questions.add(row["kind"])
    assert max(lengths) <= 6000
    assert min(lengths) > 0.97 * 6000
    assert len(questions) > 1


def test_several_questions_of_one_context(tokenizer):
    counts, lengths = [], []
    for row in make(6, 4000, questions=4, tokenizer=tokenizer):
        turns = [Turn(message["role"], message["content"]) for message in row["messages"]]
        context = turns[0].content
        for answer in turns[1::2]:
            assert answer.content in context
        for name in row["topics"].split(", "):
            assert context.count(f"def {name}(") == 1
        counts.append(len(turns) // 2)
        lengths += Lengths(tokenizer).rows([turns])
    assert max(counts) == 4
    assert max(lengths) <= 4000


def test_the_seed_decides():
    assert make(3, 2000, seed=0) == make(3, 2000, seed=0) != make(3, 2000, seed=1)


def test_train_and_eval_share_no_module():
    train, held_out = set(module_names("train")), set(module_names("eval"))
    assert not train & held_out
    assert len(held_out) > 10
    for row in make(3, 3000, part="eval"):
        headers = [line for line in row["messages"][0]["content"].splitlines() if line.startswith("# file: ")]
        assert {header.split()[2] for header in headers} <= held_out


def test_answers_are_exact_source():
    module = read_module("textwrap.py")
    target = next(target for target in module.targets if target.name == "dedent")
    source = "".join(module.lines)
    assert all(answer in source for answer in target.answers.values())
    assert target.answers["docstring"].startswith('"""Remove any common leading whitespace')
    assert all(len(target.answers[kind]) for kind in target.answers)


def test_too_short_is_an_error():
    with pytest.raises(DataError, match="too short"):
        make(1, 150)
