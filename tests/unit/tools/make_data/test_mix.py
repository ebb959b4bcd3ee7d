"""Mixes: shares kept, duplicates out, no text on both sides, and the shipped recipes on small stand-ins."""

import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from ds_longft.cli import main
from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.make_data.mix import mix_sources
from ds_longft.tools.make_data.recipe import Recipe, read_recipe
from tests.unit.conftest import chat
from tests.unit.tools.make_data.texts import chinese, english

RECIPES = Path(__file__).parents[4] / "recipes"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def mixed(folder, sources, **keys):
    recipe = Recipe.model_validate({"sources": sources, "max_length_tokens": 4096, **keys})
    done = mix_sources(recipe, folder / "out", root=folder)
    parts = {}
    for part in ("train", "eval"):
        file = folder / "out" / f"{part}.jsonl"
        parts[part] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    ledger = [json.loads(line) for line in (folder / "out" / "ledger.jsonl").read_text().splitlines()]
    return done, parts["train"], parts["eval"], ledger


@pytest.fixture
def two_languages(tmp_path):
    write(tmp_path / "en.jsonl", [chat(english(i % 30 + 2, i), english(2, 1000 + i)) for i in range(120)])
    write(tmp_path / "zh.jsonl", [chat(chinese(i % 30 + 2, i), chinese(2, 1000 + i)) for i in range(80)])
    return [{"name": "en", "path": "en.jsonl"}, {"name": "zh", "path": "zh.jsonl"}]


def test_languages_and_lengths_get_their_shares(tmp_path, two_languages):
    bands = [{"up_to_tokens": 300, "share": 0.25}, {"up_to_tokens": 4096}]
    done, train, held, _ = mixed(tmp_path, two_languages, languages={"zh": 0.1}, lengths=bands, held_out=0.05)
    rows = train + held
    languages = Counter(row["language"] for row in rows)
    assert languages["zh"] == pytest.approx(0.1 * len(rows), abs=2)
    assert len(rows) > 90
    kinds = {(kind["of"], kind["is"]): kind for kind in done.kinds}
    assert kinds["tokens up to", "300"]["share"] == pytest.approx(0.25, abs=0.02)
    assert kinds["language", "zh"]["pool"] == 80
    assert len(held) == done.eval_rows == pytest.approx(0.05 * len(rows), abs=1)
    again = mixed(tmp_path, two_languages, languages={"zh": 0.1}, lengths=bands, held_out=0.05)
    assert again[1:3] == (train, held)
    assert mixed(tmp_path, two_languages, languages={"zh": 0.1}, lengths=bands, held_out=0.05, seed=1)[1] != train


def test_near_duplicates_and_long_rows_are_listed(tmp_path):
    once = chat(english(20, 0), english(4, 1))
    again = chat(english(20, 0).replace("the", "a", 1), english(4, 1))
    write(tmp_path / "a.jsonl", [once, again, chat(english(600, 2), "long"), chat(english(20, 3), "other")])
    done, train, _, ledger = mixed(tmp_path, [{"name": "a", "path": "a.jsonl"}], held_out=0)
    assert len(train) == 2
    assert {(e["origin"], e["reason"]) for e in ledger} == {
        ("a:2", "nearly the same as an earlier row"),
        ("a:3", "too long"),
    }
    assert done.left_out == {"nearly the same as an earlier row": 1, "too long": 1}
    assert done.first_left_out["nearly the same as an earlier row"] == "a:2 (a:1)"
    assert len(mixed(tmp_path, [{"name": "a", "path": "a.jsonl"}], held_out=0, near_duplicates=None)[1]) == 3


def test_questions_about_one_document_stay_on_one_side(tmp_path):
    rng = random.Random(0)
    documents = [english(40, seed) for seed in range(40)]
    rows = [
        chat(f"{text}\n\nQuestion {i}?", english(2, 1000 + 4 * n + i))
        for n, text in enumerate(documents)
        for i in range(4)
    ]
    rng.shuffle(rows)
    write(tmp_path / "a.jsonl", rows)
    _, train, held, _ = mixed(tmp_path, [{"name": "a", "path": "a.jsonl"}], held_out=0.2)
    of = [{row["messages"][0]["content"].split("\n\n")[0] for row in part} for part in (train, held)]
    assert not of[0] & of[1]
    assert len(held) == 32
    assert len(train) == 128


def test_made_rows_are_made_of_texts_of_one_side(tmp_path):
    texts = [{"text": english(120, seed), "lang": "en"} for seed in range(12)]
    texts += [{"text": chinese(120, seed), "lang": "zh"} for seed in range(12)]
    write(tmp_path / "texts.jsonl.gz", texts)
    write(tmp_path / "reading.jsonl", [
        {"context": chinese(6, 500 + i), "qas": [{"question": f"第{i}问？", "answers": [f"甲{i}"]}], "lang": "zh"} for i in range(60)
    ])  # fmt: skip
    sources = [
        {"name": "needle", "synth": "needle", "path": "texts", "rows": 30, "context_tokens": 2000},
        {"name": "reading8x", "synth": "refgpt8x", "path": "reading", "rows": 20},
        {"name": "code", "synth": "code", "rows": 4, "context_tokens": 2000},
        {"name": "texts", "path": "texts.jsonl.gz"},
    ]
    _, train, held, _ = mixed(tmp_path, sources, held_out=0.2)
    assert {row["source"] for row in train} == {"needle", "reading8x", "code", "texts"}
    assert {row["source"] for row in held} >= {"needle", "reading8x"}
    sentences = [
        {
            s
            for row in part
            for m in row.get("messages", [{"content": row.get("text")}])
            for s in m["content"].split("。")
            if len(s) > 20
        }
        for part in (train, held)
    ]
    assert len(sentences[1]) > 20
    assert sentences[0] & sentences[1] <= {"It is not in the text."}, "an answer, not a text"


def test_trajectories_are_mixed_and_held_out(tmp_path):
    sources = [{"name": "agents", "synth": "agents", "rows": 10}]
    _, train, held, _ = mixed(tmp_path, sources, held_out=0.2, max_length_tokens=32_000)
    assert (len(train), len(held)) == (8, 2)
    assert all(row["tools"] and row["messages"][2]["tool_calls"] for row in [*train, *held])
    asked = [row["messages"][1]["content"] for row in [*train, *held]]
    assert len(set(asked)) == 10
    with pytest.raises(DataError, match=r"agents: trajectories need context_tokens of 12,800 or more"):
        mixed(tmp_path / "short", sources, max_length_tokens=8000)


def test_lists_and_near_negatives_are_mixed(tmp_path):
    texts = [{"text": f"document {seed} begins.\n" + english(200, seed), "lang": "en"} for seed in range(12)]
    write(tmp_path / "texts.jsonl", texts)
    made = {"path": "texts.jsonl", "separator": "<|end|>", "context_tokens": 2000}
    sources = [
        {"name": "near", "synth": "negatives", "rows": 6, "part_tokens": 200, **made},
        {"name": "plain", "synth": "stretches", "rows": 3, "sizes": {"1": 1}, **made, "context_tokens": 4000},
        {"name": "lists", "synth": "lists", "rows": 6, "questions": 2, "sizes": {"1/2": 1}},
    ]
    _, train, held, _ = mixed(tmp_path, sources, held_out=0.34, near_duplicates=None)
    of = {name: [row for row in [*train, *held] if row["source"] == name] for name in ("near", "plain", "lists")}
    assert all(row["text"].count("<|end|>") >= 6 and "\n\n" not in row["text"] for row in of["near"])
    assert all("<|end|>" in row["text"] for row in of["plain"])
    assert len({row["messages"][0]["content"] for row in of["lists"]}) == 6, "those held out are others"
    assert {row["source"] for row in held} >= {"lists"}
    with pytest.raises(ValueError, match="near has room for less than 4 parts in a row: lower its part_tokens"):
        mixed(tmp_path, [{**sources[0], "part_tokens": 600}])


def test_what_cannot_be_mixed_is_named(tmp_path, two_languages):
    with pytest.raises(DataError, match="languages: no usable row is fr"):
        mixed(tmp_path, two_languages, languages={"fr": 0.1})
    write(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="source pairs holds preference pairs"):
        mixed(tmp_path, [{"name": "pairs", "path": "pairs.jsonl"}])
    write(tmp_path / "bad.jsonl", [chat("q", "a"), chat("q", "")])
    with pytest.raises(DataError, match=r"source bad: 1 of 2 rows are unusable.*ledger\.jsonl"):
        mixed(tmp_path, [{"name": "bad", "path": "bad.jsonl"}])
    assert not list((tmp_path / "out").glob(".*")), "nothing half done stays"


def test_all_mistakes_of_a_recipe_at_once(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "max_length_tokens: much\nheld_out: 2\nlanguage: {zh: 0.1}\n"
        "sources: [{name: a, path: x, shar: 0.1}, {name: b, synth: needle, path: x}, {name: c}]\n"
    )
    with pytest.raises(ConfigError) as wrong:
        read_recipe(str(tmp_path / "r.yaml"))
    text = str(wrong.value)
    for part in (
        "max_length_tokens: seen 'much'", "held_out: seen 2", "unknown key language: did you mean languages?",
        "unknown key sources[0].shar: did you mean share?", "sources[1]: rows is missing", "sources[2]: path is missing",
    ):  # fmt: skip
        assert part in text, text
    (tmp_path / "r.yaml").write_text(
        "max_length_tokens: 4K\nlanguages: {zh: 0.7, en: 0.7}\nlengths: [{up_to_tokens: 2K}, {up_to_tokens: 1K}]\n"
        "sources: [{name: a, path: x}, {name: a, path: y}]\n"
    )
    with pytest.raises(
        ConfigError, match=r"(?s)name a stands twice.*languages: the shares.*rising values.*last band ends"
    ):
        read_recipe(str(tmp_path / "r.yaml"))


def test_a_shorter_longest_row_ends_bands_and_samples_there():
    recipe = str(RECIPES / "faro_open.yaml")  # bands to 2K and 24K, code of 16K
    short = read_recipe(recipe, max_length_tokens="8K")
    assert (short.max_length_tokens, [band.up_to_tokens for band in short.lengths]) == (8192, [2048, 8192])
    assert [source.context_tokens for source in short.sources if source.name == "code"] == [8192]
    tiny = read_recipe(recipe, max_length_tokens="1K")
    assert ([band.up_to_tokens for band in tiny.lengths], tiny.lengths[0].share) == ([1024], 0.5)
    assert [band.up_to_tokens for band in read_recipe(recipe, max_length_tokens="64K").lengths] == [2048, 65536]
    with pytest.raises(ConfigError, match=r"max_length_tokens.*'much'"):
        read_recipe(recipe, max_length_tokens="much")


def faro_stand_ins(folder):
    """A few rows of each of the article's sets, in the layout of its files, found by the sources' names."""
    dialogue = "<start_chat><Human 1>: {q} <Assistant 1>: {a} <end_chat>"
    write(folder / "longalign.jsonl", [
        {"messages": chat((chinese if i < 4 else english)(60, i), english(3, 900 + i))["messages"], "length": 9} for i in range(30)
    ])  # fmt: skip
    (folder / "longalpaca.json").write_text(json.dumps([
        {"instruction": english(80, 100 + i), "input": "", "output": english(4, 800 + i), "file": "x"} for i in range(30)
    ]))  # fmt: skip
    for name, text in (("refgpt8x_en", english), ("refgpt8x_zh", chinese)):
        write(folder / f"{name}.jsonl", [
            {"dialogue": dialogue.format(q=text(1, 600 + i), a=text(2, 700 + i)), "reference": text(40, 200 + i),
             "language": name[-2:], "type": "wiki"} for i in range(30)
        ])  # fmt: skip
    write(folder / "antihaystack.jsonl", [
        {"document": english(70, 300 + i), "question": english(1, 400 + i), "answer": f"Paragraph {i}"} for i in range(10)
    ])  # fmt: skip
    write(folder / "short.jsonl", [
        {"conversations": [{"from": "human", "value": english(1, 500 + i), "weight": None}, {"from": "gpt", "value": english(1, 550 + i), "weight": 1}],
         "system_prompt": None, "source": "base"} for i in range(40)
    ])  # fmt: skip


def test_the_shipped_recipe_on_stand_ins(tmp_path, tokenizer, capsys):
    faro_stand_ins(tmp_path / "root")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "model")]
    assert main(["data", "mix", str(RECIPES / "faro.yaml"), *words]) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "mix.json").read_text())
    kinds = {(kind["of"], kind["is"]): kind for kind in report["kinds"]}
    assert kinds["language", "zh"]["share"] == pytest.approx(0.1, abs=0.02)
    assert kinds["source", "short"]["share"] == pytest.approx(0.1, abs=0.02)
    assert {kind["is"] for kind in report["kinds"] if kind["of"] == "source" and kind["rows"]} == {
        "longalign", "longalpaca", "refgpt8x_en", "refgpt8x_zh", "antihaystack", "short",
    }  # fmt: skip
    assert report["exact_lengths"]
    page = (tmp_path / "out" / "stats.html").read_text()
    assert all(part in page for part in ("refgpt8x_en", "Where the work is", "packs"))
    assert "run.yaml" in shown
    assert main(["data", "stats", str(tmp_path / "out" / "run.yaml"), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["rows"] == report["train_rows"]
    assert {group["name"] for group in stats["sources"]} >= {"longalign", "antihaystack"}


@pytest.mark.skipif("DS_LONGFT_TEST_DATA" not in os.environ, reason="DS_LONGFT_TEST_DATA names no folder of real texts")
def test_the_open_recipe_on_real_texts(tmp_path):
    data = Path(os.environ["DS_LONGFT_TEST_DATA"])
    names = {"reading": "qa_zh_cmrc2018", "novels": "longdocs_zh_novels", "manuals": "longdocs_manuals_en_zh",
             "speeches": "longdocs_en_public_domain", "dialogues": "chat_zh_kdconv", "instructions": "instruct_en"}  # fmt: skip
    (tmp_path / "root").mkdir()
    for name, file in names.items():
        (tmp_path / "root" / f"{name}.jsonl.gz").symlink_to(data / f"{file}.jsonl.gz")
    done = mix_sources(read_recipe(str(RECIPES / "faro_open.yaml")), tmp_path / "out", root=tmp_path / "root")
    kinds = {(kind["of"], kind["is"]): kind for kind in done.kinds}
    assert kinds["language", "zh"]["share"] == pytest.approx(0.1, abs=0.01)
    assert done.train_rows > 500
    assert done.eval_rows > 5


def test_columns_choose_rows_of_any_source(tmp_path, two_languages):
    rows = [chat(english(3, i), "a") | {"set": f"s{i % 4}", "part": i % 2} for i in range(40)]
    write(tmp_path / "a.jsonl", rows)
    source = {"name": "a", "path": "a.jsonl", "where": {"part": "1"}, "exclude": {"set": "s3"}}
    assert len(mixed(tmp_path, [source], held_out=0, near_duplicates=None)[1]) == 10
    with pytest.raises(DataError, match=r"a\.jsonl holds no row that is taken by where set=s9: correct"):
        mixed(tmp_path, [{**source, "where": {"set": "s9"}, "exclude": {}}])
    write(tmp_path / "docs.jsonl", [{"text": english(300, i), "lang": "en"} for i in range(4)])
    made = {"name": "n", "path": "docs.jsonl", "synth": "stretches", "rows": 3}
    with pytest.raises(DataError, match=r"docs\.jsonl holds no row that is taken by exclude lang=en"):
        mixed(tmp_path, [{**made, "exclude": {"lang": "en"}}])


def test_keys_without_effect_and_missing_totals_are_refused():
    def problems(source, **keys):
        return pytest.raises(ValueError, match=keys.pop("match")), {
            "sources": [{"name": "a", "path": "a.jsonl", **source}], "max_length_tokens": 4096, **keys,
        }  # fmt: skip

    for source, match in (
        (
            {"synth": "stretches", "rows": 3, "questions": 2},
            "questions has no effect with synth: stretches, only with needle, code, lists",
        ),
        ({"synth": "needle", "rows": 3, "separator": "x"}, "separator has no effect with synth: needle, only with"),
        ({"synth": "stretches", "rows": 3, "part_tokens": 9}, "part_tokens has no effect with synth: stretches"),
        ({"sizes": {"1": 1}}, "sizes has no effect with synth: none"),
        ({"synth": "stretches", "rows": 3, "sizes": {"3/2": 1}}, "expected parts of the longest row"),
        (
            {"synth": "needle", "rows": 3, "languages": {"zh": 0.1}},
            "languages has no effect with synth: needle, only with",
        ),
        (
            {"synth": "stretches", "rows": 3, "languages": {"zh": 0.7, "en": 0.7}},
            "languages: the shares add up to 1.400",
        ),
        ({"synth": "code", "rows": 3, "exclude": {"a": "b"}}, "exclude has no effect"),
        ({"synth": "stretches", "share": 0.5}, "a has a share and no rows: give it rows, or the recipe total_rows"),
    ):
        expected, recipe = problems(source, match=match)
        with expected:
            Recipe.model_validate(recipe)
    sizes = Recipe.model_validate({
        "sources": [{"name": "a", "path": "a", "synth": "stretches", "share": 0.5, "sizes": {"1/2": 1, 1: 2}}],
        "max_length_tokens": 4096, "total_rows": 11,
    })  # fmt: skip
    assert sizes.sources[0].sizes == {"1/2": 1, "1": 2}
    assert sizes.made_rows(sizes.sources[0]) == 6
