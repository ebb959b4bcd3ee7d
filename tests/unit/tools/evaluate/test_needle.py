"""Needles: prompts of exact length with the fact where it should be, judged by the number."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_longft.cli import main
from ds_longft.config.shipped import TEMPLATES
from ds_longft.errors import ConfigError, DataError
from ds_longft.model.stops import serve_stop
from ds_longft.tools.evaluate import needle as needle_module
from ds_longft.tools.evaluate.generate import end_ids
from ds_longft.tools.evaluate.haystack import MARK, Haystack, build_prompt, chat_around
from ds_longft.tools.evaluate.needle_facts import judge, make_needle
from ds_longft.tools.evaluate.results import Rows
from ds_longft.tools.evaluate.subject import find_subject, load_subject
from ds_longft.tools.evaluate.texts import chinese, english, read_texts
from tests.tokenizer import tiny_tokenizer
from tests.unit.model.tiny import save_tiny


@pytest.mark.parametrize(
    ("answers", "reply", "expected"),
    [
        (["123456"], "The code is 123456.", (True, 1.0)),
        (["123456"], "1234567", (False, 0.0)),  # part of a longer number
        (["123456"], "654321 or 123456", (False, 1.0)),  # the first number counts
        (["123456"], "", (False, 0.0)),
        (["123456", "234567"], "123456, 234567", (True, 1.0)),
        (["123456", "234567"], "234567, 123456", (False, 1.0)),
        (["123456", "234567"], "123456 and no more", (False, 0.5)),
        (["123456"], "密码是123456。", (True, 1.0)),
    ],
)
def test_judging(answers: list[str], reply: str, expected: tuple[bool, float]) -> None:
    assert judge(answers, reply) == expected


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("form", ["single", "multi", "hop"])
def test_prompts_have_their_length_and_hold_the_facts(form: Any, language: Any) -> None:
    tokenizer = tiny_tokenizer()
    text = english(0)[:40000] if language == "en" else chinese(0)
    haystack = Haystack.make(tokenizer, [text])
    rng = random.Random(3)
    needle = make_needle(form, language, 3, rng)
    assert len(needle.answers) == (3 if form == "multi" else 1)
    depths = [0.5] if form == "single" else [0.1, 0.5, 0.9]
    prompt = build_prompt(tokenizer, haystack, needle, language, tokens=2500, depths=depths, rng=rng)
    shown = tokenizer.decode(prompt.ids)
    assert len(prompt.ids) == 2500
    assert all(sentence in shown for sentence in needle.sentences)
    assert needle.question.strip() in shown
    assert shown.rstrip().endswith("<|im_start|>assistant")
    assert all(abs(a - b) < 0.15 for a, b in zip(prompt.depths, depths, strict=True))
    if form == "hop":  # the name asked for is not the one with the number
        holder = next(s for s in needle.sentences if needle.answers[0] in s)
        asked = [w for w in needle.question.replace("?", "").split() if w in holder.split() and w.istitle()]
        assert language == "zh" or not set(asked) - {"The", "In", "At"}


def test_depth_zero_and_one_and_text_that_is_too_short() -> None:
    tokenizer = tiny_tokenizer()
    haystack = Haystack.make(tokenizer, ["One sentence stands here. " * 40])
    text = haystack.stretch(5, 400)
    out, (depth,) = text.hide([(0.0, [7, 7])])
    assert (out[:2], depth) == ([7, 7], 0.0)
    out, (depth,) = text.hide([(1.0, [7, 7])])
    assert depth > 0.9
    assert [t for t in out if t != 7] == [t for t in text.ids if t != 7]
    with pytest.raises(DataError, match="give a longer text"):
        Haystack.make(tokenizer, ["short"])
    needle = make_needle("single", "en", 1, random.Random(0))
    with pytest.raises(ConfigError, match="leave no room"):
        build_prompt(tokenizer, haystack, needle, "en", tokens=60, depths=[0.0], rng=random.Random(0))


def test_an_answer_is_asked_for_without_thinking_and_ends_with_its_turn(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (TEMPLATES / "qwen3_thinking.jinja").read_text()
    tokenizer.eos_token = "<|endoftext|>"  # a base model that was given a chat template
    _, tail = chat_around(tokenizer, f"text {MARK} Which code?")
    assert tokenizer.decode(tail).endswith("Which code?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tiny_model(tmp_path / "model")
    loaded = load_subject(find_subject(str(tmp_path / "model")), torch.device("cpu"), attention="sdpa")
    named = {"<|im_end|>", "<|endoftext|>"}
    loaded.plain.config.eos_token_id = loaded.plain.generation_config.eos_token_id = tokenizer.eos_token_id
    assert set(tokenizer.convert_tokens_to_ids(["<|endoftext|>"])) == end_ids(loaded, tokenizer), "as it is served"
    serve_stop(tokenizer, loaded.plain.config, loaded.plain.generation_config)  # as a run writes it
    assert set(tokenizer.convert_tokens_to_ids(sorted(named))) <= end_ids(loaded, tokenizer)


def test_plain_prompts_begin_as_the_tokenizer_begins_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    assert chat_around(tokenizer, f"Read. {MARK}")[0] == tokenizer("Read. ")["input_ids"]  # it has a bos and adds none


def test_texts_of_any_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    rows = [{"text": "one", "lang": "en"}, {"text": "two", "lang": "zh"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert read_texts(str(tmp_path), "en") == ["plain", "one", "two", "packed"]
    assert read_texts(str(tmp_path / "b.jsonl"), "en", where="lang=zh") == ["two"]
    with pytest.raises(DataError, match="no such file"):
        read_texts(str(tmp_path / "missing.txt"), "en")
    with pytest.raises(DataError, match="holds no text"):
        read_texts(str(tmp_path / "b.jsonl"), "en", where="lang=de")
    with pytest.raises(ConfigError, match="column=value"):
        read_texts(str(tmp_path / "b.jsonl"), "en", where="lang")
    assert len(english(200_000)) > 200_000


def test_rows_with_any_character_are_there_after_a_crash(tmp_path: Path) -> None:
    replies = ["one\u2028two\x85three", "第二", "third"]
    rows = Rows(tmp_path, "needle", {"seed": 0}, total=3, show=False)
    for i, reply in enumerate(replies):
        rows.add({"key": str(i), "reply": reply})
    rows.close()
    whole = rows.path.read_bytes()
    again = Rows(tmp_path, "needle", {"seed": 0}, total=3, show=False)
    assert [row["reply"] for row in again.rows] == replies
    again.close()
    rows.path.write_bytes(whole[: whole.index("二".encode()) + 1])  # cut inside a character
    again = Rows(tmp_path, "needle", {"seed": 0}, total=3, show=False)
    assert [row["reply"] for row in again.rows] == replies[:1]
    again.close()


def tiny_model(folder: Path) -> Path:
    """A tiny model with a tokenizer, window 4096."""
    save_tiny(folder, vocab_size=600, max_position_embeddings=4096)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_the_grid_is_resumed_and_drawn(
    tiny_folder: Path, tmp_path: Path, on_two_ranks: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "eval"
    argv = [
        "eval",
        "needle",
        str(tiny_folder),
        "--lengths",
        "600,1K",
        "--depths",
        "0,100",
        "--trials",
        "2",
        "--out",
        str(out),
    ]
    assert main([*argv, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["rows_made_now"] == 8
    assert first["exact_percent"]["en"] == {"600": 0.0, "1024": 0.0}  # random weights
    assert (out / "needle.png").read_bytes()[:4] == b"\x89PNG"
    lines = (out / "needle.rows.jsonl").read_text().splitlines()
    (out / "needle.rows.jsonl").write_text("\n".join(lines[:6]) + "\n" + lines[6][:20])  # killed in the middle of a row
    assert main([*argv, "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["rows_made_now"] == 3
    assert second["grid"] == first["grid"]
    assert len((out / "needle.rows.jsonl").read_text().splitlines()) == len(lines)
    assert main([*argv, "--json", "--seed", "1"]) == 0  # other settings begin anew
    assert json.loads(capsys.readouterr().out)["rows_made_now"] == 8
    # several processes ask the same questions, and leave the same rows in the same order
    on_two_ranks([*argv, "--gpus", "2", "--out", str(tmp_path / "two")])
    shared = [json.loads(line) for line in (tmp_path / "two" / "needle.rows.jsonl").read_text().splitlines()]
    alone = [json.loads(line) for line in lines]
    for row in shared + alone:
        row.pop("seconds", None)
    assert shared == alone
    # right answers are counted where they belong
    verdicts = iter([False, False, True, False])  # trials of 600 tokens, then of 1,024
    monkeypatch.setattr(needle_module, "judge", lambda answers, reply: (next(verdicts), 0.5))
    assert main([*argv, "--json", "--seed", "2", "--form", "multi", "--facts", "2"]) == 0
    third = json.loads(capsys.readouterr().out)
    assert third["exact_percent"]["en"] == {"600": 0.0, "1024": 50.0}
    assert third["found_percent"]["en"] == {"600": 50.0, "1024": 50.0}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lengths", "many"], "--lengths is 'many'"),
        (["--depths", "0,200"], "--depths is"),
        (["--languages", "de"], "--languages is 'de'"),
        (["--facts", "1"], "--facts is 1"),
        (["--gpus", "0"], "--gpus is 0: expected 1 or more"),
        (["--gpus", "2", "--lengths", "many"], "--lengths is 'many'"),
        (["--before"], "no output folder of a run"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(["eval", "needle", str(tmp_path), *flags]) == 64
    assert said in capsys.readouterr().err


def test_ranks_that_are_started_and_one_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Real processes; who says what, in which order: `test_processes.py`."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", "needle", str(tmp_path), "--gpus", "2"])
    assert ended.value.code == 64
    assert capfd.readouterr().err.count("model.path: no tokenizer can be read from") == 1, "said once"


@pytest.mark.slow
def test_ranks_that_are_started_and_answer(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["eval", "needle", str(tiny_folder), "--lengths", "600", "--depths", "50", "--trials", "2", "--gpus", "2"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    assert "needle en" not in capsys.readouterr().out, "it was not this process that did it"
    assert len((tmp_path / "needle.rows.jsonl").read_text().splitlines()) == 3
