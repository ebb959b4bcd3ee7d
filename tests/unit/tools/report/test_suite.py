"""`eval suite`: one command, one table, the same prompts before and after."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from ds_longft.cli import main
from ds_longft.config.read import dump_config, load_run_config
from ds_longft.tools.evaluate import short as short_module
from ds_longft.tools.report import suite as suite_module
from ds_longft.tools.report.suite import _lengths, compared
from tests.unit.tools.evaluate.test_longproc import copy  # noqa: F401 - a fixture
from tests.unit.tools.evaluate.test_needle import tiny_model
from tests.unit.tools.evaluate.test_reason import ROW


def test_differences_are_taken_row_by_row() -> None:
    before = {"m, %": {"a": {"1": 0.0, "2": 100.0}, "b": {"3": 50.0}}, "only before": {"": {"1": 1.0}}}
    after = {"m, %": {"a": {"1": 10.0, "2": 110.0}, "b": {"3": 60.0}}}
    (one,) = compared(before, after)
    assert (one["name"], one["rows"]) == ("m, %", 3)
    assert one["before"][0] == 50.0, "each part counts the same"
    assert one["before"][1] < 40
    assert one["before"][2] > 60
    assert one["difference"] == [10.0, 10.0, 10.0], "every row gained 10, which nothing drawn anew changes"


def test_lengths_of_a_preset() -> None:
    assert _lengths("quick", 131072) == [32768, 131072]
    assert _lengths("paper", 131072) == [4096, 8192, 16384, 32768, 65536, 131072]
    assert _lengths("paper", 2048) == [2048]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run that trained all weights of a tiny model."""
    base, folder = tiny_model(tmp_path / "base"), tmp_path / "run"
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.05)
    model.save_pretrained(folder)
    config = load_run_config(["--model.path", str(base), "--data.train", "a.jsonl", "--output_dir", str(folder)])
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text("")
    (folder / "README.md").write_text("---\ntags: [long-context]\n---\n\n# run\n\nhow to load it\n")
    return folder


def test_one_table_in_page_and_card(
    run: Path,
    copy: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suite_module, "ruler", functools.partial(suite_module.ruler, tasks="fwe,own_qa_1"))
    monkeypatch.setattr(suite_module, "short", functools.partial(suite_module.short, texts=2, length=32))
    monkeypatch.setattr(short_module, "questions", lambda: [("Which one?", "this")])
    monkeypatch.setattr(suite_module, "longproc", functools.partial(suite_module.longproc, tasks="path_traversal"))
    monkeypatch.setattr("ds_longft.tools.evaluate.longproc.command.SIZES", {"0.5k": 8})
    (run / "data.json").write_text(json.dumps([ROW]))
    argv = ["eval", "suite", str(run), "--lengths", "1500", "--rows", "1", "--longproc_data", str(copy), "--json"]
    argv += ["--longbench_v2", str(run / "data.json")]
    assert main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    names = ["RULER 1,500, %", "needles 1,500, %", "loss of short texts", "short questions, %"]
    names += ["LongProc 0.5k, %", "LongBench v2, %"]
    assert [measure["name"] for measure in result["measures"]] == names
    assert [measure["rows"] for measure in result["measures"]] == [2, 5, 2, 1, 1, 1]
    loss = result["measures"][2]
    assert loss["before"] != loss["after"]
    asked_before, asked_after = (
        [json.loads(line)["question"] for line in (run / "eval" / name).read_text().splitlines()[1:]]
        for name in ("ruler-before.rows.jsonl", "ruler.rows.jsonl")
    )
    assert asked_before == asked_after
    assert "Before and after" in (run / "report.html").read_text()
    card = ModelCard.load(run / "README.md")
    assert card.data.model_name == "run"
    assert card.data.tags == ["long-context"]
    assert [one.dataset_name for one in card.data.eval_results] == [name.removesuffix(", %") for name in names]
    assert card.data.eval_results[2].metric_value == loss["after"][0]
    assert "how to load it" in card.text
    assert main(argv) == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["measures"] == result["measures"]
    assert "ruler-before: 2 of 2 rows are there already" in again.err
    assert (run / "README.md").read_text().count("Training report") == 1


PROGRAM = """
import functools, sys
from ds_longft.cli import main
from ds_longft.tools.evaluate import short
from ds_longft.tools.report import suite
suite.ruler = functools.partial(suite.ruler, tasks="fwe")
suite.needle = functools.partial(suite.needle, depths="50")
suite.short = functools.partial(suite.short, texts=1, length=32)
short.questions = lambda: [("Which one?", "this")]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_it_goes_on_with_the_row_it_was_at(run: Path) -> None:
    argv = [sys.executable, "-c", PROGRAM, "eval", "suite", str(run), "--lengths", "1500", "--rows", "4", "--json"]
    rows, give_up = run / "eval" / "ruler-before.rows.jsonl", time.monotonic() + 250
    killed = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not rows.exists() or len(rows.read_bytes().splitlines()) < 2:
        assert killed.poll() is None, "it ended before it was killed"
        assert time.monotonic() < give_up
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -9
    answered, _, cut = rows.read_bytes().rpartition(b"\n")
    made = len(answered.splitlines()) - 1
    gone_on = subprocess.run(argv, capture_output=True, check=True)
    assert f"ruler-before: {made} of 4 rows are there already".encode() in gone_on.stderr
    assert rows.read_bytes().startswith(answered), f"what was answered stays, what was cut ({cut!r}) is asked again"
    assert [measure["rows"] for measure in json.loads(gone_on.stdout)["measures"]] == [4, 1, 1, 1]


@pytest.mark.parametrize(
    ("flags", "gpus"),
    [([], 5), (["--sp", "2"], 4), (["--gpus", "3"], 3), (["--sp", "8"], 8), (["--weights", "sharded", "--sp", "2"], 2)],
)
def test_all_gpus_share_the_work(run: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], gpus: int) -> None:
    monkeypatch.setattr(suite_module, "visible_gpus", lambda: 5)
    asked = []
    monkeypatch.setattr(suite_module, "ruler", lambda *_, flags, **__: asked.append(flags.ranks) or sys.exit(9))
    with pytest.raises(SystemExit):
        main(["eval", "suite", str(run), *flags])
    assert asked == [gpus]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sp", "0"], "--sp is 0: expected 1 or more"),
        (["--preset", "long"], "--preset: seen 'long'"),
        (["--rows", "0"], "--rows is 0"),
        (["--longproc_data", "nowhere"], "expected LongProc's data folder"),
        (["--longbench_v2", "nowhere.json"], "nowhere.json"),
        ([], "no output folder of a run"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(["eval", "suite", str(tmp_path), *flags]) == 64
    assert said in capsys.readouterr().err
