"""Stretches of running text: lengths filled to the token, shares kept."""

import json
import random
from collections import Counter
from dataclasses import replace

import pytest

from ds_longft.cli import main
from ds_longft.data.formats import to_row
from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.row_plan import Wanted, apportion, language_shares, plan_rows
from ds_longft.tools.make_data.synth.sources import Document
from ds_longft.tools.make_data.synth.stretches import running_texts, stretch_rows
from tests.unit.tools.make_data.texts import chinese, english

LONGEST = 4096
SHARES = {"zh": 0.15}


@pytest.fixture(scope="module")
def documents():
    made = [Document(english(120, seed), "en", f"en{seed}") for seed in range(12)]
    return made + [Document(chinese(150, seed), "zh", f"zh{seed}") for seed in range(12)]


@pytest.fixture(scope="module")
def made(documents, tokenizer):
    """Rows with lengths counted by a tokenizer."""
    wanted = Wanted(64, LONGEST, 0, "s", Lengths(tokenizer))
    return list(stretch_rows(documents, wanted, languages=SHARES))


def tokens_of(row, lengths):
    return lengths.rows([to_row(row, "messages", source="", origin="").turns])[0]


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


def test_stretches_stand_in_the_texts_as_they_are(made, documents):
    whole = {lang: "\n\n".join(d.text for d in documents if d.language == lang) for lang in ("en", "zh")}
    for row in made:
        assert row["text"] in whole[row["language"]] + "\n\n"
    assert len({row["text"][:50] for row in made}) > 50


def test_the_seed_decides_and_lengths_can_be_estimated(documents):
    rows = list(stretch_rows(documents, Wanted(6, 1500, 0, "s")))
    assert list(stretch_rows(documents, Wanted(6, 1500, 0, "s"))) == rows
    assert list(stretch_rows(documents, Wanted(6, 1500, 1, "s"))) != rows
    assert all(400 < tokens_of(row, Lengths()) <= 1500 for row in rows)


def test_shares_are_kept_to_the_row():
    assert apportion(10, {"a": 3, "b": 3, "c": 2}) == {"a": 4, "b": 4, "c": 2}
    assert apportion(0, {"a": 1}) == {"a": 0}
    assert language_shares({"en": 30, "zh": 50, "fr": 10}, {"zh": 0.2}) == pytest.approx(
        {"zh": 0.2, "en": 0.6, "fr": 0.2}
    )
    assert language_shares({"en": 3}, {"zh": 0.2}) == {"en": 1.0}, "all of the rows, as the only one"
    assert language_shares({"zh": 3}, {"en": 1.0}) == {"zh": 1.0}
    planned = Counter(plan_rows(20, {"en": 1}, 65536, random.Random(0), sizes={"1/4": 3, "1": 1}))
    assert planned == {("en", 16384): 15, ("en", 65536): 5}
    with pytest.raises(ConfigError, match=r"sizes: seen 2: 1, expected parts of the longest row between 0 and 1"):
        plan_rows(20, {"en": 1}, 65536, random.Random(0), sizes={"2": 1})


def test_texts_that_are_too_short_are_named(documents):
    with pytest.raises(DataError, match=r"hold 1\d,\d+ tokens together, a stretch of 1,000,000 was wanted"):
        list(stretch_rows(documents[:3], Wanted(1, 1_000_000, 0, "s"), sizes={"1": 1}))


def test_a_stretch_goes_on_in_the_next_document_of_its_language(documents, tokenizer):
    text = running_texts(documents, Lengths(tokenizer))["en"]
    assert text.cut(0, text.tokens).count("\n\n") >= 12
    assert text.cut(0, 100) == text.text[: text.starts[100]]
    rng = random.Random(0)
    starts = [text.place(1000, rng) for _ in range(50)]
    assert all(start <= text.starts[-1000] for start in starts)
    assert text.place(text.tokens, rng) == 0


def test_an_end_of_text_stands_between_documents_of_a_row(documents, tokenizer):
    wanted = Wanted(4, 2048, 0, "s", Lengths(tokenizer))
    short = [replace(document, text=document.text[:1500]) for document in documents]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for separator, least in (("<|im_end|>", 1), ("\n\n", 0)):
        made = stretch_rows(short, wanted, sizes={"1": 1}, separator=separator)
        counts = [tokenizer(row["text"])["input_ids"].count(end) for row in made]
        assert sum(counts) >= least * len(counts)
        assert least or not any(counts)


def test_the_command(documents, tmp_path, capsys, tokenizer):
    rows = [{"text": d.text, "lang": d.language, "kept": "no"} for d in documents]
    rows.append({"text": "Not this one. " * 900, "lang": "en", "kept": "yes"})
    for number in range(2):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[number::2]]
        (tmp_path / f"texts_{number}.jsonl").write_text("\n".join(lines))
    tokenizer.save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "texts_*.jsonl"), str(tmp_path / "out.jsonl"), "--rows", "20", "--context_tokens", "2K"]
    words += ["--exclude", "kept=yes", "--languages", "zh:0.25", "--sizes", "1/2:1,1:1", "--json"]
    assert main(["data", "synth", "stretches", *words, "--tokenizer", str(tmp_path / "model")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 20
    assert facts["exact_lengths"]
    assert 1000 < facts["shortest_tokens"] <= 1024
    assert 2030 < facts["longest_tokens"] <= 2048
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert Counter(row["language"] for row in made) == {"en": 15, "zh": 5}
    assert not any("Not this one" in json.dumps(row) for row in made)
    assert main(["data", "synth", "stretches", *words, "--where", "lang=zh"]) == 0
    capsys.readouterr()
    assert '"en"' not in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--sizes", "1/2"], "--sizes is '1/2': expected names and shares, e.g. 1/4:3,1:1"),
        (["--sizes", "2:1"], "sizes: seen 2: 1.0, expected parts of the longest row"),
        (["--languages", "en:0.9,zh:0.2"], "the shares add up to more than 1"),
        (["--where", "lang"], "--where is 'lang', expected column=value"),
        (["--rows", "0"], "--rows is 0: expected 1 or more"),
        (["--where", "lang=fr"], "holds no row that is taken by where lang=fr"),
    ],
)
def test_mistakes_on_the_command_line(flags, expected, documents, tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": documents[0].text, "lang": "en"}))
    assert main(["data", "synth", "stretches", str(tmp_path / "t.jsonl"), str(tmp_path / "out.jsonl"), *flags]) == 64
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
