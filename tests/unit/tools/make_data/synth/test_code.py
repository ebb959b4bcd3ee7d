import json

import pytest

from ds_longft.data.rows import Turn
from ds_longft.data.template_source import load_template
from ds_longft.errors import DataError
from ds_longft.tools.make_data.synth.code import module_names, read_module, write_code_set


def read(path):
    return [json.loads(line) for line in path.open()]


def test_rows_fit_exactly_and_answers_stand_in_the_context(tokenizer, tmp_path):
    done = write_code_set(tmp_path / "a.jsonl", rows=12, context_tokens=6000, seed=3, tokenizer=tokenizer)
    template = load_template(tokenizer, None)
    lengths, questions = [], set()
    for row in read(tmp_path / "a.jsonl"):
        question, answer = (message["content"] for message in row["messages"])
        assert answer in question
        assert row["function"] in question.splitlines()[-1]
        assert question.count(f"def {row['function']}(") == 1
        assert answer.count("\n") < 30
        assert len(answer) > 20
        turns = [Turn("user", question), Turn("assistant", answer)]
        lengths.append(len(tokenizer(template.render(turns).text)["input_ids"]))
        questions.add(row["question"])
    assert max(lengths) == done.longest_tokens <= 6000
    assert min(lengths) == done.shortest_tokens > 0.97 * 6000
    assert len(questions) > 1


def test_several_questions_of_one_context(tokenizer, tmp_path):
    done = write_code_set(tmp_path / "a.jsonl", rows=6, context_tokens=4000, questions=4, tokenizer=tokenizer)
    template = load_template(tokenizer, None)
    counts, lengths = [], []
    for row in read(tmp_path / "a.jsonl"):
        turns = [Turn(message["role"], message["content"]) for message in row["messages"]]
        context = turns[0].content
        for answer in turns[1::2]:
            assert answer.content in context
        for name in row["function"].split(", "):
            assert context.count(f"def {name}(") == 1
        counts.append(len(turns) // 2)
        lengths.append(len(tokenizer(template.render(turns).text)["input_ids"]))
    assert max(counts) == 4
    assert max(lengths) == done.longest_tokens <= 4000


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_code_set(tmp_path / name, rows=3, context_tokens=2000, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_train_and_eval_share_no_module(tmp_path):
    train, held_out = set(module_names("train")), set(module_names("eval"))
    assert not train & held_out
    assert len(held_out) > 10
    write_code_set(tmp_path / "eval.jsonl", rows=3, context_tokens=3000, part="eval")
    for row in read(tmp_path / "eval.jsonl"):
        headers = [line for line in row["messages"][0]["content"].splitlines() if line.startswith("# file: ")]
        assert {header.split()[2] for header in headers} <= held_out


def test_answers_are_exact_source():
    module = read_module("textwrap.py")
    target = next(target for target in module.targets if target.name == "dedent")
    source = "".join(module.lines)
    assert all(answer in source for answer in target.answers.values())
    assert target.answers["docstring"].startswith('"""Remove any common leading whitespace')
    assert all(len(target.answers[kind]) for kind in target.answers)


def test_too_short_is_an_error(tmp_path):
    with pytest.raises(DataError, match="too short"):
        write_code_set(tmp_path / "a.jsonl", rows=1, context_tokens=150)
    assert list(tmp_path.iterdir()) == []
