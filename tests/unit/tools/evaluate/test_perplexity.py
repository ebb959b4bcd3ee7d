"""Loss by position: what transformers computes, token by token; and the other evaluations on a tiny model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ds_longft.cli import main
from ds_longft.errors import DataError
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.attention import ULYSSES, register
from ds_longft.tools.evaluate.perplexity import pieces_of, summarize
from ds_longft.tools.evaluate.position_loss import read_in_windows, token_losses
from ds_longft.tools.evaluate.short import is_right
from ds_longft.tools.evaluate.subject import find_subject, load_subject
from tests.tokenizer import tiny_tokenizer
from tests.unit.tools.evaluate.test_needle import tiny_model


@pytest.mark.parametrize(("window", "starts"), [(90, [0]), (40, [0, 30, 60]), (48, [0, 36, 72])])
def test_losses_by_position_are_those_of_transformers(window: int, starts: list[int], tiny_folder: Path) -> None:
    """Whole and in windows: those of each window alone, without the quarter that the window before has counted."""
    folder = tiny_folder
    ids = torch.randint(3, 600, (90,), generator=torch.Generator().manual_seed(0)).tolist()
    register()
    loaded = load_subject(find_subject(str(folder)), torch.device("cpu"), attention=ULYSSES)
    at, found = token_losses(loaded, read_in_windows(ids, window, 1), ParallelLayout(1, 0, 1), "auto")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    losses = np.zeros(90)
    for start in reversed(starts):  # the earlier window counts
        part = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logits = plain(part, use_cache=False).logits[0, :-1]
        end = start + part.shape[1]
        losses[start + 1 : end] = torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="none").numpy()
    assert sorted(at.tolist()) == list(range(1, 90)), "nothing predicts the first token"
    np.testing.assert_allclose(found, losses[at], rtol=1e-4)


@pytest.mark.parametrize("tokens", [8, 9, 31, 32, 33, 56, 57, 200])
@pytest.mark.parametrize("window", [8, 9, 32, 1000])
def test_windows_count_each_token_once(tokens: int, window: int) -> None:
    ids = list(range(100, 100 + tokens))
    text = read_in_windows(ids, window, 4)
    assert text.pack.tokens % 4 == 0
    counted = np.flatnonzero(text.pack.loss_weights)
    assert sorted(text.pack.labels[counted].tolist()) == ids[1:]
    assert (text.pack.labels[counted] == text.pack.input_ids[counted] + 1).all()
    assert (text.positions[counted] == text.pack.input_ids[counted] - 100).all()
    before = text.pack.position_ids[counted] + 1
    assert (before >= np.minimum(text.positions[counted] + 1, window // 4)).all()
    assert np.diff(text.pack.cu_seqlens).max() == min(window, tokens)


def test_summary() -> None:
    rows = [{"loss_sums": [7.0, 16.0, 24.0, 32.0], "targets": [7, 8, 8, 8]}] * 2
    found = summarize(rows, 32, 4)
    assert found["loss_by_bucket"] == [1.0, 2.0, 3.0, 4.0]
    assert found["loss_by_range"] == {"0-8": 1.0, "8-16": 2.0, "16-32": 3.5}
    assert found["loss"] == pytest.approx(79 / 31, abs=1e-4)
    assert found["loss_by_eighth"][0] is None  # finer than the buckets
    rows = [{"loss_sums": [7.0, 16.0, 24.0, 32.0, 40.0, 48.0, 56.0, 64.0, 72.0, 80.0], "targets": [7, *[8] * 9]}]
    tenths = summarize(rows, 80, 10)
    assert set(tenths["loss_by_eighth"]) == {None}, "no eighth ends where a tenth does"
    assert tenths["loss_by_range"] == {"0-8": 1.0, "8-16": 2.0, "16-32": 3.5, "32-64": 6.5, "64-80": 9.5}
    assert summarize(rows, 100, 10)["loss_by_range"] == {"0-20": 1.5333, "20-30": 3.0, "30-60": 5.0, "60-100": 8.5}


def test_pieces_do_not_overlap_and_are_spread() -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"text number {i} goes on and on. " * 30 for i in range(4)]
    pieces = pieces_of(tokenizer, texts, 100, 3, join=False)
    assert [len(p) for p in pieces] == [100] * 3
    assert len({tokenizer.decode(p)[:20] for p in pieces}) >= 2
    with pytest.raises(DataError, match="lay shorter ones together"):
        pieces_of(tokenizer, texts, 100_000, 3, join=False)
    assert len(pieces_of(tokenizer, texts, 1000, 1, join=True)[0]) == 1000


def test_joined_texts_are_a_ring_whose_places_are_read_at_every_position() -> None:
    """Three texts a length long: begun at 24 places an eighth apart, each eighth of them reads all there is once."""
    tokenizer = tiny_tokenizer()
    texts = [f"text number {i} goes on and on. " * 30 for i in range(4)]
    stream = [id for text in texts for id in tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]]
    tokens = len(stream) // 24 * 8
    pieces = pieces_of(tokenizer, texts, tokens, 24, join=True)
    assert {len(piece) for piece in pieces} == {tokens}
    assert pieces[0] == stream[:tokens]
    assert pieces[23] == (stream[23 * len(stream) // 24 :] + stream)[:tokens]
    for eighth in range(8):
        part = slice(eighth * tokens // 8, (eighth + 1) * tokens // 8)
        read = Counter(id for piece in pieces for id in piece[part])
        assert read.total() >= len(stream) - 24
        assert not read - Counter(stream)


@pytest.mark.parametrize("length", ["0", "-5", "1", "0K"])
@pytest.mark.parametrize("sp", ["1", "2"])
def test_a_length_that_holds_no_target_is_refused_before_anything_starts(
    length: str, sp: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ds_longft.tools.evaluate.evaluation.start_ranks", lambda *_: pytest.fail("ranks were started"))
    assert main(["eval", "perplexity", "no-model", f"--length={length}", "--sp", sp]) == 64
    assert "--length is" in capsys.readouterr().err


def test_commands_on_a_tiny_model(
    tiny_folder: Path, tmp_path: Path, on_two_ranks: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_folder, str(tmp_path / "eval")
    copy = tmp_path / "longbench"
    copy.mkdir()
    (copy / "dataset2prompt.json").write_text(json.dumps({"lcc": "{context}next:", "samsum": "{context}\n{input}"}))
    row = {"input": "who?", "context": "x = 1\n" * 300, "answers": ["x = 1"], "length": 100, "all_classes": None}
    for task in ("lcc", "samsum"):
        (copy / f"{task}.jsonl").write_text((json.dumps(row) + "\n") * 2)
    argv = ["eval", "longbench", "run", str(model), "--data", str(copy), "--tasks", "lcc,samsum", "--max_length", "200"]
    assert main([*argv, "--out", out, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["scores"]) == {"lcc", "samsum"}
    assert result["rows_made_now"] == 4
    rows = Path(out, "longbench.rows.jsonl")
    assert main(["eval", "longbench", "score", str(rows), "--json"]) == 0  # the rows alone give the same scores
    assert json.loads(capsys.readouterr().out)["scores"] == result["scores"]
    on_two_ranks([*argv, "--out", str(tmp_path / "two"), "--gpus", "2"])
    assert (tmp_path / "two" / "longbench.rows.jsonl").read_text() == rows.read_text()
    assert main(["eval", "short", str(model), "--texts", "2", "--length", "64", "--out", out, "--json"]) == 0
    short = json.loads(capsys.readouterr().out)
    assert short["questions"] == 60
    assert 5 < short["loss"] < 20
    argv[argv.index("--tasks") + 1] = "lcc"
    for flags in (
        [],
        ["--prompts", str(copy / "other.json")],
    ):  # other prompts, then other rows: none of the old answers
        (copy / "other.json").write_text(json.dumps({"lcc": "Code:\n{context}next:"}))
        assert main([*argv, "--out", out, "--json", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["rows_made_now"] == 2
    (copy / "lcc.jsonl").write_text((json.dumps(row | {"context": "y = 2\n"}) + "\n") * 2)
    assert main([*argv, "--out", out, "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["rows_made_now"] == 2
    assert main([*argv, "--out", out, "--limit", "0"]) == 64
    assert "--limit is 0" in capsys.readouterr().err
    argv[argv.index("--tasks") + 1] = "hotpotqa"
    assert main([*argv, "--out", out]) == 64
    assert "has no prompt for hotpotqa" in capsys.readouterr().err
    assert main(["eval", "longbench", "run", str(model), "--data", str(model), "--tasks", "lcc"]) == 64
    assert "dataset2prompt.json" in capsys.readouterr().err


def test_a_model_in_its_own_window_beside_the_stretched_one(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "eval"
    (tmp_path / "book.txt").write_text("one and two and three. " * 200)
    argv = [
        "eval",
        "perplexity",
        str(tiny_folder),
        "--text",
        str(tmp_path / "book.txt"),
        "--length",
        "128",
        "--texts",
        "2",
    ]
    argv += ["--out", str(out), "--json"]
    found = []
    for flags in (["--window", "32"], [], ["--window", "128"]):
        assert main([*argv, *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    windows, whole, one_window = found
    assert [f["rows_made_now"] for f in found] == [2, 2, 2], "another window, another measurement"
    assert windows["settings"]["window_tokens"] == 32
    assert one_window["loss_by_bucket"] == whole["loss_by_bucket"]
    assert windows["loss_by_bucket"][:16] == pytest.approx(whole["loss_by_bucket"][:16], abs=1e-4)
    assert windows["loss_by_bucket"][16:] != pytest.approx(whole["loss_by_bucket"][16:], abs=1e-4)
    assert main([*argv, "--window", "4"]) == 64
    assert "--window is 4: expected 8 or more" in capsys.readouterr().err


def test_other_text_under_the_same_name_is_measured_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = tiny_model(tmp_path / "model"), tmp_path / "book.txt"
    argv = ["eval", "perplexity", str(model), "--text", str(text), "--length", "128", "--texts", "2", "--json"]
    made = []
    for words in ("one and two and three. ", "another book altogether. ", "another book altogether. "):
        text.write_text(words * 200)
        assert main([*argv, "--out", str(tmp_path / "eval")]) == 0
        result = json.loads(capsys.readouterr().out)
        made.append((result["rows_made_now"], result["loss"]))
    assert [rows for rows, _ in made] == [2, 2, 0]
    assert made[0][1] != made[1][1] == made[2][1]
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e5
    (model / "config.json").write_text(json.dumps(config, indent=1))
    assert main([*argv, "--out", str(tmp_path / "eval")]) == 0
    assert json.loads(capsys.readouterr().out)["rows_made_now"] == 2, "the same weights at other positions"


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("9", "4 + 5 = 9.", True),
        ("9", "19", False),
        ("old", "It is cold.", False),
        ("Old", "**old**", True),
        ("Athens", "Athens' hills", True),
    ],
)
def test_a_short_answer_is_a_word_of_its_own(answer: str, reply: str, right: bool) -> None:
    assert is_right(answer, reply) is right
