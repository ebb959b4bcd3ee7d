"""Hidden numbers: lengths filled to the token, shares kept, answers that stand in the text, other words than the evaluation's."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from jinja2 import Template

from ds_longft.cli import main
from ds_longft.config.yaml_io import load_yaml
from ds_longft.data.formats import to_row
from ds_longft.errors import DataError
from ds_longft.tools.evaluate import needle_facts as asked_in_evaluation
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.sources import Document
from examples.extend_smollm2.extend import main as extend
from examples.extend_smollm2.hidden_numbers import MAX_QUESTIONS, SENTENCE_END, hide, number_rows
from examples.extend_smollm2.number_grammar import KINDS, Telling
from examples.extend_smollm2.number_wordings import SPEECH, facts_about
from tests.unit.conftest import chat
from tests.unit.tools.make_data.test_mix import write
from tests.unit.tools.make_data.texts import chinese, english

EXAMPLE = Path(__file__).parents[2] / "examples" / "extend_smollm2"
LONGEST = 4096
SHARES = {"zh": 0.15}


@pytest.fixture(scope="module")
def documents():
    made = [Document(english(120, seed), "en", f"en{seed}") for seed in range(12)]
    return made + [Document(chinese(150, seed), "zh", f"zh{seed}") for seed in range(12)]


@pytest.fixture(scope="module")
def made(documents, tokenizer):
    """Rows with lengths counted by a tokenizer."""
    settings = {"rows": 64, "context_tokens": LONGEST, "seed": 0, "languages": SHARES, "lengths": Lengths(tokenizer)}
    return list(number_rows(documents, name="n", **settings))


def tokens_of(row, lengths):
    return lengths.rows([to_row(row, "messages", source="", origin="").turns])[0]


@pytest.mark.slow
def test_each_answer_stands_in_the_text_beside_the_name_that_is_asked_for(made):
    turns = Counter()
    for row in made[::3]:
        messages = row["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        context, _, first = messages[0]["content"].rpartition("\n\n")
        questions = [first, *(m["content"] for m in messages[2::2])]
        patterns = all_patterns(row["language"])
        hidden = {}
        for i, (statement, _) in enumerate(patterns):
            for found in statement.finditer(context):
                hidden[i, name_in(found)] = found["v"]
        answered = 0
        for question, reply in zip(questions, (m["content"] for m in messages[1::2]), strict=True):
            asked = sorted(
                (found.start(), (i, name_in(found)))
                for i, (_, pattern) in enumerate(patterns)
                for found in pattern.finditer(question)
            )
            assert reply == ", ".join(hidden[key] for _, key in asked)
            turns[len(asked)] += 1
            answered += len(asked)
        assert answered == len(hidden)
    assert set(turns) == {1, 2, 3, 4}


def test_numbers_lie_evenly_over_the_text(documents, tokenizer):
    settings = {"sizes": {"1": 1}, "questions": 40, "at_once": 1, "lengths": Lengths(tokenizer)}
    depths = []
    for row in number_rows(documents, rows=48, context_tokens=LONGEST, seed=0, name="n", **settings):
        messages = row["messages"]
        text = messages[0]["content"]
        depths += [text.index(m["content"]) / len(text) for m in messages[1::2]]
    quarters = Counter(int(4 * depth) for depth in depths)
    assert len(depths) > 200
    assert all(abs(quarters[i] / len(depths) - 0.25) < 0.1 for i in range(4)), quarters


def test_one_number_in_eight_stands_at_an_edge(documents, tokenizer):
    settings = {
        "sizes": {"1": 1},
        "questions": 40,
        "at_once": 1,
        "languages": {"en": 1.0},
        "lengths": Lengths(tokenizer),
    }
    numbers = first = last = 0
    for row in number_rows(documents, rows=60, context_tokens=LONGEST, seed=0, name="n", **settings):
        context, _, _ = row["messages"][0]["content"].rpartition("\n\n")
        head = next(head for head in SPEECH["en"].heads if context.startswith(head))
        facts = [m["content"] for m in row["messages"][1::2]]
        told = [sentence for sentence in re.split(SENTENCE_END, context[len(head) :]) if sentence.strip()]
        holds = [any(fact in sentence for fact in facts) for sentence in told]
        numbers += len(facts)
        first += next(i for i, held in enumerate([*holds, False]) if not held)
        last += next(i for i, held in enumerate([*holds[-2::-1], False]) if not held)  # behind: half a sentence of text
    assert numbers > 400
    assert 0.03 < first / numbers < 0.1
    assert 0.03 < last / numbers < 0.1


def test_some_rows_hide_few_numbers_and_some_many(documents, tokenizer):
    settings = {"sizes": {"1": 1}, "lengths": Lengths(tokenizer)}
    hidden = Counter()
    for row in number_rows(documents, rows=80, context_tokens=LONGEST, seed=0, name="n", questions=16, **settings):
        hidden[sum(len(m["content"].split(", ")) for m in row["messages"][1::2])] += 1
    assert min(hidden) == 4
    assert max(hidden) in (15, 16)
    few = sum(rows for count, rows in hidden.items() if count < 8)
    assert 28 <= few <= 52, "as many rows hide 4 to 8 as 8 to 16"
    two = number_rows(documents, rows=9, context_tokens=LONGEST, seed=0, name="n", questions=2, **settings)
    assert all(sum(len(m["content"].split(", ")) for m in row["messages"][1::2]) == 2 for row in two)


def test_short_rows_hide_fewer_numbers_and_stay_half_text(documents, tokenizer):
    lengths = Lengths(tokenizer)
    rows = list(number_rows(documents, rows=40, context_tokens=LONGEST, seed=0, name="n", questions=32,
                            sizes={"1/8": 1, "1/2": 1}, lengths=lengths))  # fmt: skip
    answers = {512: [], 2048: []}
    for row in rows:
        numbers = [number for m in row["messages"][1::2] for number in m["content"].split(", ")]
        answers[512 if tokens_of(row, lengths) <= 512 else 2048] += [len(numbers)]
    assert min(answers[512]) >= 1
    assert max(answers[512]) < 0.6 * max(answers[2048])
    assert max(answers[2048]) < 32


@cache
def all_patterns(language):
    """Patterns that read a statement and a question back, for every sentence there is: its number is group v, its name another."""
    speech = SPEECH[language]
    grammar = speech.grammar
    behind = rf"(?: (?:{'|'.join(grammar.contexts)}))?" if grammar.asked_last else ""
    patterns = []

    def add(kind, objects, nouns, statement, question):
        name = f"({name_pattern(kind, speech)})"
        things = "|".join(
            re.escape(o).replace(r"\{noun\}", f"(?:{'|'.join(nouns)})").replace(r"\{n\}", name) for o in objects
        )

        def pattern(template, behind):
            filled = re.escape(template[:-1]).replace(r"\{it\}", f"(?:{things})").replace(r"\{n\}", name)
            filled = filled.replace(r"\{word\}", f"(?:{'|'.join(grammar.words)})")
            filled = filled.replace(r"\{v\}", r"(?P<v>\d+)") + behind + re.escape(template[-1])
            return re.compile(filled, re.IGNORECASE)

        patterns.append((pattern(statement, behind), pattern(question, behind)))

    for telling in [*speech.tellings, *framed(speech)]:
        add(telling.kind, (), (), telling.statement, telling.question)
    for kind in KINDS:
        for statement, question in grammar.relations:
            add(kind, grammar.objects[kind], grammar.nouns[kind], statement, question)
    return patterns


def name_in(found):
    """What a pattern found as the name: its only group beside the number."""
    (name,) = {group for group in found.groups() if group and group != found.groupdict().get("v")}
    return name


def framed(speech):
    """Every noun in every frame about every kind of name."""
    return [
        Telling(kind, statement.replace("{noun}", noun), question.replace("{noun}", noun))
        for statement, question in speech.frames
        for noun in speech.nouns
        for kind in KINDS
    ]


def all_texts(speech):
    """Every sentence there is, those of the grammar without a context, and each of its relations with each word and in each context."""
    grammar = speech.grammar
    for telling in [*speech.tellings, *framed(speech)]:
        yield from (telling.statement, telling.question)
    for pair in grammar.relations:
        for template in pair:
            if "{word}" in template:
                yield from (template.replace("{word}", word) for word in grammar.words)
            sentence = template.replace("{word}", grammar.words[0])
            for kind in KINDS:
                for thing in grammar.objects[kind]:
                    yield from (sentence.replace("{it}", thing.replace("{noun}", n)) for n in grammar.nouns[kind])
            for context in grammar.contexts:
                yield from (grammar.put(sentence, context, last=last) for last in (False, True))
    yield from (*speech.heads, *speech.one, *speech.several)


def name_pattern(kind, speech):
    """Every name of a kind, of the lists or made up."""

    def parts(listed, ends):
        return f"(?:{'|'.join(listed)}|(?:{'|'.join(speech.beginnings)})(?:{'|'.join(ends)}))"

    if kind == "person":
        first, last = parts(speech.first_names, speech.first_ends), parts(speech.last_names, speech.last_ends)
        return speech.person.format(first=first, last=last)
    if kind == "place":
        return parts(speech.places, speech.place_ends)
    thing = f"(?:{'|'.join(speech.things)})"
    return f"{thing}(?:{speech.blank}{thing})?"


def made_up_parts(speech):
    return {
        beginning + end
        for ends in (speech.place_ends, speech.first_ends, speech.last_ends)
        for beginning in speech.beginnings
        for end in ends
    }


@pytest.mark.parametrize("language", SPEECH)
def test_names_of_a_kind_are_different_and_there_are_enough(language):
    speech, rng = SPEECH[language], random.Random(0)
    assert speech.most_names >= MAX_QUESTIONS
    for kind in KINDS:
        pattern = re.compile(name_pattern(kind, speech))
        listed = 0
        for count in [4] * 40 + [MAX_QUESTIONS]:
            names = speech.names(kind, count, rng)
            assert len(set(names)) == count
            assert all(pattern.fullmatch(name) for name in names)
            listed += names[0] in {*speech.places, *speech.things} or any(n in names[0] for n in speech.first_names)
        assert 8 < listed < 33, "half of the draws are of the lists"
    firsts, lasts = zip(*(name.split() for name in SPEECH["en"].names("person", MAX_QUESTIONS, rng)), strict=True)
    assert len({*firsts, *lasts}) == 2 * MAX_QUESTIONS, "people share no part of their names"


def test_training_asks_with_other_words_and_names_than_the_evaluation():
    """No name in common, no noun of its questions, no four words (six characters of Chinese) in a row."""
    trained = {lang: list(all_texts(speech)) for lang, speech in SPEECH.items()}
    evaluated = {
        lang: [text for w in asked_in_evaluation.WORDINGS[lang] for text in (w.statement, w.link, w.question)]
        + [asked_in_evaluation.HEAD[lang], *(asked_in_evaluation.ASK[lang, several] for several in (False, True))]
        for lang in SPEECH
    }
    for lang, words in (("en", 4), ("zh", 6)):
        shared = runs(trained[lang], words) & runs(evaluated[lang], words)
        assert not shared
    nouns = {"en": "locker|badge|harbour|register|boat|visitor", "zh": "储物柜|访客|港口|登记|船"}
    for lang, pattern in nouns.items():
        assert not re.search(pattern, " ".join(trained[lang]), re.IGNORECASE)
        assert all(re.search(pattern, w.question, re.IGNORECASE) for w in asked_in_evaluation.WORDINGS[lang])
    names = {part for speech in SPEECH.values() for part in (*speech.first_names, *speech.last_names, *speech.places)}
    names |= {thing for speech in SPEECH.values() for thing in speech.things}
    names |= {part for speech in SPEECH.values() for part in made_up_parts(speech)}
    lists = (asked_in_evaluation.FIRST_EN, asked_in_evaluation.LAST_EN, asked_in_evaluation.FIRST_ZH)
    assert not names & {name for part in (*lists, asked_in_evaluation.LAST_ZH) for name in part}


def runs(texts, count):
    """Every run of so many words, or characters of Chinese, in any of the texts; what is filled in stands for itself."""
    found = set()
    for text in texts:
        words = re.findall(r"[\u4e00-\u9fff]|\{\w+\}|[\w']+", text.lower())
        words = ["_" if word.startswith("{") else word for word in words]
        found |= {tuple(words[i : i + count]) for i in range(len(words) - count + 1)}
    return {run for run in found if run.count("_") < count - 1}


def test_most_rows_tell_all_numbers_in_the_same_words():
    rng = random.Random(0)
    rows = [facts_about(SPEECH["en"], MAX_QUESTIONS, rng) for _ in range(200)]
    same = [len({re.sub(r"[A-Z]\w+( [A-Z]\w+)?|\d+", "", statement) for statement, _, _ in row}) <= 2 for row in rows]
    assert 120 <= sum(same) <= 180
    assert all(len({fact[2] for fact in row}) == MAX_QUESTIONS for row in rows)
    assert {len(fact[2]) for row in rows for fact in row} == {4, 5, 6, 7, 8}


def test_sentences_are_hidden_behind_sentence_ends():
    text = "One. Two is 3.14! 三。Four"
    assert hide(text, ["A."], [0.0], " ") == " A. One. Two is 3.14! 三。Four"
    assert hide(text, ["B.", "A."], [1.0, 0.5], " ") == "One. A.  Two is 3.14! 三。 B. Four"


def test_rows_have_the_planned_lengths_to_a_few_tokens_and_languages(made, tokenizer):
    lengths = Lengths(tokenizer)
    sizes = (512, 512, 512, 1024, 2048, 4096)  # 1/32 and 1/16 of 4,096 are below the shortest
    assert Counter(row["language"] for row in made) == {"zh": 10, "en": 54}
    seen = Counter()
    for row in made:
        tokens = tokens_of(row, lengths)
        size = next(size for size in sizes if tokens <= size)
        assert size - 12 <= tokens
        seen[size] += 1
    assert seen == pytest.approx({512: 36, 1024: 12, 2048: 8, 4096: 8}, abs=1)
    assert len({row["id"] for row in made}) == 64


def test_the_seed_decides_and_lengths_can_be_estimated(documents):
    settings = {"rows": 6, "context_tokens": 1500, "name": "n"}
    rows = list(number_rows(documents, seed=0, **settings))
    assert list(number_rows(documents, seed=0, **settings)) == rows
    assert list(number_rows(documents, seed=1, **settings)) != rows
    assert all(400 < tokens_of(row, Lengths()) <= 1500 for row in rows)
    assert number_rows(documents, seed=0, at_once=1, **settings) != rows
    single = list(number_rows(documents, seed=0, at_once=1, questions=5, sizes={"1": 1}, **settings))
    counts = {len(row["messages"]) for row in single}
    assert counts <= {2, 4, 6, 8, 10}
    assert len(counts) > 1


def test_texts_that_are_too_short_or_foreign_are_named(documents):
    with pytest.raises(DataError, match="no English or Chinese text"):
        next(number_rows([Document("un texte", "fr", "0")], rows=1, context_tokens=1000, seed=0, name="n"))
    with pytest.raises(DataError, match="leave no room for text"):
        list(number_rows(documents, rows=1, context_tokens=30, seed=0, name="n"))


def test_the_command(documents, tmp_path, capsys, tokenizer):
    rows = [{"text": d.text, "lang": d.language, "kept": "no"} for d in documents]
    rows.append({"text": "Not this one. " * 900, "lang": "en", "kept": "yes"})
    for number in range(2):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[number::2]]
        (tmp_path / f"texts_{number}.jsonl").write_text("\n".join(lines))
    tokenizer.save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "texts_*.jsonl"), str(tmp_path / "out.jsonl"), "--rows", "20", "--context_tokens", "2K"]
    words += ["--exclude", "kept=yes", "--languages", "zh:0.25", "--sizes", "1/2:1,1:1", "--json"]
    assert extend(["numbers", *words, "--tokenizer", str(tmp_path / "model")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 20
    assert facts["exact_lengths"]
    assert 1000 < facts["shortest_tokens"] <= 1024
    assert 2030 < facts["longest_tokens"] <= 2048
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert Counter(row["language"] for row in made) == {"en": 15, "zh": 5}
    assert not any("Not this one" in json.dumps(row) for row in made)
    assert extend(["numbers", *words, "--where", "lang=zh"]) == 0
    capsys.readouterr()
    assert '"en"' not in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--questions", "129"], "--questions is 129, --at_once is 4: expected 1 to 128"),
        (["--questions", "2", "--at_once", "3"], "and no more at once than there are"),
        (["--sizes", "2:1"], "sizes: seen 2: 1.0, expected parts of the longest row"),
    ],
)
def test_mistakes_on_the_command_line(flags, expected, documents, tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": documents[0].text, "lang": "en"}))
    assert extend(["numbers", str(tmp_path / "t.jsonl"), str(tmp_path / "out.jsonl"), *flags]) == 64
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_script_runs_by_itself(tmp_path):
    """Its folder comes first among those that modules are looked for in."""
    command = [sys.executable, str(EXAMPLE / "extend.py"), "numbers", str(tmp_path / "t.jsonl"), "out", "--rows", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 64
    assert "--rows is 0: expected 1 or more" in done.stderr


def test_the_demonstration_recipe_makes_stretches_numbers_and_takes_chats(tmp_path, tokenizer, capsys):
    """Columns choose the rows, shares hold to the row, and chats and plain texts of one file are both trained."""
    texts = [
        {"text": make(200, seed), "lang": lang, "collection": "a"}
        for lang, make in (("en", english), ("zh", chinese)) for seed in range(8)
    ]  # fmt: skip
    texts += [{"text": "Kept for the evaluation. " * 500, "lang": "en", "collection": "Shakespeare plays (sample)"}]
    write(tmp_path / "root" / "longdocs_one.jsonl.gz", texts[::2])
    write(tmp_path / "root" / "longdocs_two.jsonl", texts[1::2])
    asked = {"qas": [{"question": "What?", "answer": "That."}], "lang": "en"}
    questions = [
        {"context": english(200, 50 + i), "eval_kind": kind, **asked} for kind in ("f1", "exam") for i in range(8)
    ]
    questions[-1]["context"] = "Passages that are repeated. " * 500
    write(tmp_path / "root" / "longqa_one.jsonl", questions)
    write(tmp_path / "root" / "instruct_short.jsonl", [chat(english(3, i), "a") for i in range(20)])
    (tmp_path / "root" / "notes.txt").write_text("not of the pattern")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "model")]
    words += ["--total_rows", "100", "--max_length_tokens", "4K"]
    hide = [
        "--context_tokens",
        "4K",
        "--questions",
        "64",
        "--tokenizer",
        str(tmp_path / "model"),
        "--sizes",
        "1/32:20,1/4:2,1:1",
    ]
    for pattern, file, *more in (
        (
            "longdocs_*",
            "numbers",
            "--rows",
            "39",
            "--languages",
            "zh:0.15",
            "--exclude",
            "collection=Shakespeare plays (sample)",
        ),
        (
            "longqa_*",
            "numbers_other",
            "--rows",
            "24",
            "--exclude",
            "eval_kind=exam",
            "--name",
            "numbers in other texts",
        ),
    ):
        assert (
            extend(
                ["numbers", str(tmp_path / "root" / pattern), str(tmp_path / "root" / f"{file}.jsonl"), *hide, *more]
            )
            == 0
        )
    assert main(["data", "mix", str(EXAMPLE / "data.yaml"), *words]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert Counter(row["source"] for row in rows) == {
        "stretches": 13, "stretches of other texts": 12, "numbers": 39, "numbers in other texts": 24, "chats": 12,
    }  # fmt: skip
    assert Counter(row["language"] for row in rows if row["source"] == "numbers") == {"en": 33, "zh": 6}
    assert all(row["language"] == "en" for row in rows if row["source"] != "numbers")
    assert {"messages" in row for row in rows} == {True, False}
    assert not any("Kept for the" in json.dumps(row) or "Passages that are" in json.dumps(row) for row in rows)
    capsys.readouterr()
    assert main(["data", "stats", str(tmp_path / "out" / "run.yaml"), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["rows"], stats["bad_rows"]) == (100, 0)
    trained = {group["name"]: group["targets"] / group["tokens"] for group in stats["sources"]}
    assert trained["stretches"] > 0.99
    assert 0 < trained["numbers"] < 0.2


def test_the_harness_task_reads_the_rows_of_numbers() -> None:
    """lm-evaluation-harness renders the columns of a row, and looks for the number in the reply."""
    task = load_yaml((EXAMPLE / "lm_eval" / "longft_numbers.yaml").read_text())
    documents = [Document("A sentence of ten words stands here again and again. " * 400, "en", "0")]
    made = number_rows(documents, rows=4, context_tokens=900, seed=0, name="n", questions=1, at_once=1, sizes={"1": 1})
    (regex,) = [f["regex_pattern"] for f in task["filter_list"][0]["filter"] if f["function"] == "regex"]
    for row in made:
        prompt, target = (Template(task[key]).render(**row) for key in ("doc_to_text", "doc_to_target"))
        assert prompt == row["messages"][0]["content"]
        assert target == row["messages"][1]["content"]
        assert re.findall(regex, f"It is {target}.")[0] == target
    assert (task["output_type"], task["test_split"]) == ("generate_until", *task["dataset_kwargs"]["data_files"])
