"""The page of a run: everything in one file, whatever is there yet, the same facts as markdown."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds_longft.cli import COMMANDS, main
from ds_longft.command_line import bind
from ds_longft.config.read import config_of_run, dump_config, load_run_config
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import EXIT_CONFIG
from ds_longft.tools.pages.charts import Line, line_chart, numbers, shown, thin, ticks
from ds_longft.tools.report import run_facts
from ds_longft.tools.report.markdown import markdown_page
from ds_longft.tools.report.page import html_page
from ds_longft.tools.report.run_facts import gather_facts
from ds_longft.tools.report.tables import reproduce
from ds_longft.tools.report.verdict import cost, interval, verdict

VOID = {"meta", "link", "br", "img", "line", "polyline", "circle", "input", "hr"}


class Tags(HTMLParser):
    """Checks that tags are closed in order, and notes everything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)
        found = dict(attrs)
        named = [str(v) for k, v in attrs if k in ("src", "srcset") or (k == "href" and tag == "link")]
        self.fetched += [address for address in named if not address.startswith("data:")]
        if tag == "a":
            self.links.append(str(found["href"]))
        if "id" in found:
            self.ids.append(str(found["id"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def step(number: int, **more: Any) -> dict[str, Any]:
    record = {
        "step": number, "epoch": 0, "loss": 3.0 / number, "grad_norm": 1.0, "learning_rate": 1e-4,
        "tokens_per_s_per_gpu": 1000.0 * number, "mfu": None, "peak_gib": 40.0 + number, "padding_percent": 1.0,
        "data_wait_percent": 0.5, "step_s": 2.0, "tokens_seen": 1000 * number, "targets_weight": 10.0,
    }  # fmt: skip
    return record | more


def needle_result(model: str, value: float) -> dict[str, Any]:
    settings = {
        "weights": [model], "form": "single", "facts": 1, "lengths": [8192, 131072], "depths": [0.0, 1.0], "trials": 2,
        "languages": ["en"], "haystacks": {"en": "built in"}, "where": None, "seed": 0,
    }  # fmt: skip
    sample = {
        "language": "en", "length_tokens": 131072, "stands_at": [0.5], "hidden": ["A <b> holds 123456."],
        "question": "Which?", "answers": ["123456"], "reply": "<script>alert(1)</script>", "exact": False,
    }  # fmt: skip
    return {
        "kind": "needle", "form": "single", "model": model, "date": "2026-01-01 00:00:00", "settings": settings,
        "exact_percent": {"en": {"8192": 100.0, "131072": value}}, "found_percent": {"en": {"8192": 100.0, "131072": value}},
        "grid": {"en": [[100.0, value], [100.0, value]]}, "lengths": [8192, 131072], "depths": [0.0, 1.0], "samples": [sample],
    }  # fmt: skip


def perplexity_result(model: str, last: float) -> dict[str, Any]:
    return {
        "kind": "perplexity", "model": model, "date": "2026-01-01 00:00:00", "length_tokens": 131072, "texts": 2,
        "settings": {"weights": [model], "text": "plays.jsonl", "length_tokens": 131072, "join": True},
        "loss": 3.0, "perplexity": 20.1, "edges_tokens": [0, 65536, 131072], "loss_by_bucket": [3.0, last],
        "loss_by_eighth": [3.0, 3.0, 3.0, 3.0, last, last, last, last], "loss_by_range": {"0-65536": 3.0},
    }  # fmt: skip


def ruler_result(model: str, value: float) -> dict[str, Any]:
    settings = {
        "weights": [model], "tasks": ["vt", "own_qa_1"], "rows": 20, "essays": None, "squad": None, "hotpotqa": None,
        "seed": 42, "lengths": [4096, 131072], "texts_fingerprint": "ab",
    }  # fmt: skip
    sample = {"question": "Find all", "answers": ["ABCDE"], "reply": "<b>", "right": False}
    return {
        "kind": "ruler", "model": model, "date": "2026-01-01 00:00:00", "settings": settings, "samples": [sample],
        "averages": {"4096": 50.0, "131072": value}, "intervals": {"4096": [40.0, 60.0], "131072": [0.0, 100.0]},
        "by_length": {"vt": {"4096": 0.0, "131072": value}, "own_qa_1": {"4096": 100.0, "131072": value}},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run as training and evaluation leave it."""
    folder = tmp_path / "my run"
    (folder / "eval").mkdir(parents=True)
    (folder / "checkpoint-3").mkdir()
    config = load_run_config(["--model.path", "some/model", "--data.train", "a.jsonl", "--output_dir", str(folder)])
    (folder / "config.yaml").write_text(dump_config(config))
    records = [step(1), step(2), {"step": 2, "eval_loss": 1.5, "eval_targets": 7, "eval_s": 1.0}, step(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    machine = {"device": "H200", "cores": 32, "world": 2, "sp": 2, "dp": 1}
    (folder / "versions.json").write_text(json.dumps({"versions": {"torch": "2.11"}, "machine": machine}))
    (folder / "run_status.json").write_text(json.dumps({"exit_code": 0, "error": None}))
    (folder / "plan.json").write_text(json.dumps({"peak_gib": 44.5}))
    part = {
        "rows": 4, "tokens": 100, "targets": 10, "target_share": 0.1, "median_tokens": 20, "longest_tokens": 60,
        "rows_up_to_tokens": {"32": 3, "64": 1}, "sources": {"a.jsonl": 4}, "languages": {}, "fingerprint": "abc",
        "bad_rows": 1, "overlong_rows_dropped": 0, "truncated_rows": 0,
    }  # fmt: skip
    sample = {"origin": "a.jsonl:1", "tokens": 60, "before": "question & more", "trained": "the answer"}
    (folder / "data.json").write_text(json.dumps({"total_steps": 3, "parts": {"train": part}, "sample": sample}))
    for name, content in (
        ("needle-before", needle_result("base", 0.0)),
        ("needle", needle_result("tuned", 95.5)),
        ("perplexity-before", perplexity_result("base", 7.7)),
        ("perplexity", perplexity_result("tuned", 3.1)),
        ("ruler-before", ruler_result("base", 11.1)),
        ("ruler", ruler_result("tuned", 66.6)),
    ):
        (folder / "eval" / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_the_page_is_whole_and_fetches_nothing(run: Path) -> None:
    page = html_page(gather_facts(run))
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.fetched == []
    hub = '<p>From <a href="https://huggingface.co/some/model">some/model</a></p>'  # a link, which is not fetched
    assert page.count(hub) == 1
    assert not re.search(r"https?://|url\(|@import", page.replace(hub, ""))
    assert {link.removeprefix("#") for link in tags.links if link.startswith("#")} <= set(tags.ids)
    assert len([link for link in tags.links if not link.startswith("#")]) == 1
    assert "<script>alert(1)" not in page
    for words in (
        "done (exit code 0)",
        "some/model",
        "sp 2, dp 1",
        "planned",
        "95.5",
        "+95.5",
        "-4.600",
        "question & more",
    ):
        assert words in tags.text, words
    assert page.count('class="chart"') == 7
    assert 'http-equiv="refresh"' not in page
    assert "needle" in tags.text.rpartition("Reproduce")[2]


def test_markdown_has_the_same_facts(run: Path) -> None:
    text = markdown_page(gather_facts(run))
    for words in (
        "| base model | some/model |",
        "| 131,072 tokens, en: all right, % | 0.0 | 95.5 | +95.5 |",
        "torch 2.11",
    ):
        assert words in text
    assert "--before" in text
    assert all(len(line.split("|")) > 3 for line in text.splitlines() if line.startswith("|"))


def test_a_run_still_going(run: Path) -> None:
    shutil.rmtree(run / "eval")
    for name in ("run_status.json", "data.json", "versions.json", "plan.json"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss"')  # being written
    facts = gather_facts(run)
    page = html_page(facts)
    assert facts.status == "running, step 3"
    assert 'http-equiv="refresh"' in page
    (run / "metrics.jsonl").unlink()
    assert "no step yet" in html_page(gather_facts(run))
    markdown_page(gather_facts(run))


def test_a_run_that_failed(run: Path) -> None:
    (run / "run_status.json").write_text(json.dumps({"exit_code": 70, "error": "the <loss> is not finite"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(4, loss=None, grad_norm=None, skipped="the loss is not finite")) + "\n")
        file.write(json.dumps(step(5, loss_spike=7.5, **{"rewards/accuracies": 0.5})) + "\n")
        file.write(json.dumps(step(6, **{"rewards/accuracies": 0.75})) + "\n")
    page = html_page(gather_facts(run))
    assert "1, the last at step 5" in page
    assert 'aria-label="Accuracy"' in page
    assert "not finite (exit code 70)" in page
    assert "the &lt;loss&gt; is not finite" in page
    assert "skipped steps" in page


def test_a_run_on_pairs_says_so(run: Path) -> None:
    config = load_run_config(["--config", str(run / "config.yaml"), "--objective", "dpo", "--dpo.beta", "0.2"])
    (run / "config.yaml").write_text(dump_config(config))
    text = markdown_page(gather_facts(run))
    assert "| objective | DPO: sigmoid, beta 0.2, reference auto, passes auto |" in text
    assert "token weighting" not in text


def test_before_and_after_of_different_settings_are_marked(run: Path) -> None:
    other = needle_result("base", 0.0)
    other["settings"]["trials"] = 9
    (run / "eval" / "needle-before.json").write_text(json.dumps(other))
    for page in (html_page(gather_facts(run)), markdown_page(gather_facts(run))):
        assert page.count("made with different settings: trials 9 and ") == 1


def test_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert Path(made["page"]).read_text().startswith("<!doctype html>")
    assert Path(made["markdown"]).read_text().startswith("## Training report")
    (run / "README.md").write_text("# card\n")
    for _ in range(2):  # the second time it replaces what it put there
        assert main(["report", str(run), "--card"]) == 0
    card = (run / "README.md").read_text()
    assert card.startswith("# card\n")
    assert card.count("## Training report") == 1
    for out in (str(run / "page.md"), str(run), str(run / "missing" / "page.html")):
        assert main(["report", str(run), "--out", out]) == 64
        assert f"--out is {out}" in capsys.readouterr().err
    assert main(["report", str(run / "eval")]) == 64
    assert "no config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("inside", [".", "eval/.."])
def test_the_page_of_the_folder_one_is_in_bears_its_name(
    inside: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    assert main(["report", inside]) == 0
    capsys.readouterr()
    assert "<h1>my run</h1>" in (run / "report.html").read_text()
    assert f"{run}-again" in (run / "report.md").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_charts_answer_to_the_keyboard(run: Path, tmp_path: Path) -> None:
    """In a real browser: the arrow keys move the cursor of a chart and put its values into words."""
    press = (
        "<script>const f = document.querySelector('figure[aria-label=Loss]'); f.focus();"
        "f.dispatchEvent(new KeyboardEvent('keydown', {key: 'End', bubbles: true}));</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text(html_page(gather_facts(run)).replace("</body>", press))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    words = "optimizer step 3 (per target token or pair)\ntraining: 1\nheld out: 1.5, at 2</output>"
    assert words in dom
    assert "visibility: visible" in dom


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_long_words_do_not_widen_the_page_of_a_phone(run: Path, tmp_path: Path) -> None:
    result = needle_result("tuned", 95.5)
    result["model"] = result["samples"][0]["reply"] = "x" * 300
    (run / "eval" / "needle.json").write_text(json.dumps(result))
    (tmp_path / "page.html").write_text(html_page(gather_facts(run)).replace("<details>", "<details open>"))
    measure = "document.body.title = document.querySelector('iframe').contentDocument.documentElement.scrollWidth"
    frame = f'<body onload="{measure}"><iframe src="page.html" style="width: 390px; border: 0"></iframe></body>'
    (tmp_path / "phone.html").write_text(frame)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--dump-dom", f"file://{tmp_path / 'phone.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (width,) = re.findall(r'<body[^>]* title="(\d+)"', dom)
    assert int(width) <= 390


def test_the_commands_under_again_are_commands(run: Path) -> None:
    """What the page prints is taken by the program: every flag exists, and values with blanks are quoted."""
    plays = {"where": "collection=Shakespeare plays (sample)", "haystacks": {"en": "my plays.jsonl.gz"}}
    for name, more in (("needle-zh", {"depths": [0.1, 0.5]}), ("needle-multi", {"form": "multi", "facts": 4} | plays)):
        result = needle_result("some/model", 0.0)
        result |= {"kind": "needle-multi" if "form" in more else "needle", "settings": result["settings"] | more}
        (run / "eval" / f"{name}.json").write_text(json.dumps(result))
    chinese = perplexity_result("some/model", 3.0)
    chinese["settings"]["text"] = "built in, zh"
    (run / "eval" / "perplexity-zh.json").write_text(json.dumps(chinese))
    asked = {"tasks": ["lcc"], "e": False, "limit": None, "data": "my copy", "prompts": "p.json"}
    scored = {"kind": "longbench", "model": "m", "date": "", "settings": asked, "scores": {"lcc": 1.0}, "averages": {}}
    (run / "eval" / "longbench.json").write_text(json.dumps(scored))
    commands = [shlex.split(line) for line in reproduce(gather_facts(run))]
    assert commands[0] == [
        "ds-longft",
        "train",
        f"{run}/config.yaml",
        "--gpus",
        "2",
        "--sp",
        "2",
        "--output_dir",
        f"{run}-again",
    ]
    given = {}
    for words in commands[1:]:
        called = words[2:4] if words[2] == "longbench" else words[2:3]
        name = " ".join(["eval", *called])
        module, _, function = COMMANDS[name].target.partition(":")
        bound = bind(getattr(importlib.import_module(module), function), name, words[2 + len(called) :])
        given[" ".join(words)] = bound.arguments
    (chinese,) = [a for line, a in given.items() if "--name perplexity-zh" in line]
    assert chinese["language"] == "zh"
    (longbench,) = [a for line, a in given.items() if "eval longbench run" in line]
    assert {"data": "my copy", "prompts": "p.json", "tasks": "lcc"}.items() <= longbench.items()
    (ruler, _) = [a for line, a in given.items() if "eval ruler" in line]
    assert (ruler["tasks"], ruler["lengths"], ruler["rows"]) == ("vt,own_qa_1", "4096,131072", 20)
    assert "essays" not in ruler
    (single,) = [a for line, a in given.items() if "--name needle-zh" in line]
    assert single["depths"] == "10,50"
    assert "facts" not in single, "refused with one needle"
    (multi,) = [a for line, a in given.items() if "--form multi" in line]
    assert {"where": "collection=Shakespeare plays (sample)", "facts": 4}.items() <= multi.items()
    assert "depths" not in multi


def test_the_first_section_says_whether_it_worked(run: Path) -> None:
    """Before and after of each evaluation, with intervals, the cost, and the command."""
    facts = gather_facts(run)
    rows = {what: (before, after) for what, before, after in verdict(facts)}
    (last,) = [row for what, row in rows.items() if what.startswith("loss in the last eighth")]
    evaluation = next(e for e in facts.evaluations if e.kind == "perplexity")
    assert last == tuple(
        f"{r['loss_by_eighth'][-1]:.3f}" if r else "not measured" for r in (evaluation.before, evaluation.after)
    )
    page = html_page(facts)
    assert (
        page.index("From ")
        < page.index("Before and after")
        < page.index("ds-longft train")
        < page.index("Training</h2>")
    )
    assert "hours" in cost(facts)


def test_the_held_out_loss_is_a_result_too(run: Path) -> None:
    """Of a run that nothing else was asked of; from before step 1, or it would be no before."""
    assert "held-out loss" not in {what for what, *_ in verdict(gather_facts(run))}
    records = (run / "metrics.jsonl").read_text()
    before = json.dumps({"step": 0, "eval_loss": 3.25, "eval_targets": 7, "eval_s": 1.0})
    (run / "metrics.jsonl").write_text(f"{before}\n{records}")
    assert ("held-out loss", "3.2500", "1.5000") in verdict(gather_facts(run))


@pytest.mark.parametrize(("percent", "n", "told"), [(100, 20, " (84 to 100)"), (50, 60, " (38 to 62)"), (10, 0, "")])
def test_a_share_has_an_interval(percent: float, n: int, told: str) -> None:
    assert interval(percent, n) == told


def test_two_runs_on_one_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("\n  learning_rate: ", "\n  learning_rate: 0.5 # "))
    assert main(["report", str(run), str(other)]) == 0
    page = (run / "compare.html").read_text()
    differing = page[page.index("What differs</h2>") : page.index("What all share</h2>")]
    assert "0.5, " in differing
    assert "base model" not in differing
    assert page.count("Training loss") >= 1
    assert main(["report", *[str(run)] * 6]) == EXIT_CONFIG


def test_charts() -> None:
    assert ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert ticks(0, 10, whole=True) == [0, 5, 10]
    assert ticks(1, 3, count=6, whole=True) == [1, 2, 3]
    assert ticks(1024, 130048, count=8, powers=True) == [32768 * i for i in range(5)]
    assert numbers([0, 0.0005, 0.001]) == ["0", "5e-4", "1e-3"], "one way of writing for an axis"
    assert ticks(3.02, 3.2)[0] <= 3.02
    assert ticks(5, 5)[-1] > 5
    assert [shown(v) for v in (0, 131072, 0.00025, 1500, 7.325)] == ["0", "128K", "2.5e-4", "1,500", "7.325"]
    peaks = [(float(i), 9.0 if i == 2777 else -9.0 if i == 3001 else 0.0) for i in range(5000)]
    thinned = thin(peaks)
    assert len(thinned) <= 400
    assert {(2777.0, 9.0), (3001.0, -9.0), peaks[0], peaks[-1]} <= set(thinned) <= set(peaks), "points that there are"
    assert thin([(0, 1.0), (1, float("nan"))]) == [(0, 1.0)]
    assert line_chart([Line("x", [])], name="n", x_label="", y_label="") == ""
    assert line_chart([Line("x", [(1, 1.0)]), Line("y", [(1, 2.0)])], name="n", x_label="", y_label="") == "", (
        "one step"
    )
    lost = Line("held out", [(1, float("nan"))])  # the page's script reads out every line that is there
    assert "held out" not in line_chart([Line("x", [(1, 1.0), (2, 2.0)]), lost], name="n", x_label="", y_label="")


SEEN_BY = {  # Machado, Oliveira and Fernandes, 2009: linear RGB as seen without one kind of cones
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no L": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no M": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no S": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(linear: Any) -> Any:
    """CIE Lab of linear sRGB."""
    white = [0.9505, 1, 1.089]
    rgb_to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(rgb_to_xyz @ np.clip(linear, 0, 1) / white, 0.008856, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_lines_are_told_apart_by_everyone(scheme: int) -> None:
    """Contrast with the panel below them, and with each other for the colour-blind too."""
    rules = files("ds_longft.tools.pages").joinpath("page.css").read_text("utf-8").split(":root")[scheme + 1]
    found = dict(re.findall(r"--(c\d|panel): (#\w{6});", rules))
    values = {name: np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for name, c in found.items()}
    linear = {name: np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) for name, v in values.items()}
    light = {name: float(v @ [0.2126, 0.7152, 0.0722]) + 0.05 for name, v in linear.items()}
    panel, lines = light.pop("panel"), [linear[f"c{i}"] for i in range(5)]
    assert min(max(one / panel, panel / one) for one in light.values()) > 3, "WCAG 1.4.11"
    for eyes, matrix in SEEN_BY.items():
        apart = [float(np.linalg.norm(lab(matrix @ a) - lab(matrix @ b))) for a, b in combinations(lines, 2)]
        assert min(apart) > 15, eyes


POISON = """"'><img src=x onerror="document.title='PWNED'"><script>document.title='PWNED'</script>|``` x"""


def poisonings(content: Any, poison: str = POISON) -> Iterator[Any]:
    """The content with one string of it, value or key, poisoned; once for each."""
    if isinstance(content, str):
        yield content + poison
        yield poison
    elif isinstance(content, dict):
        for key, value in content.items():
            yield {**{k: v for k, v in content.items() if k != key}, key + poison: value}
            for inner in poisonings(value, poison):
                yield {**content, key: inner}
    elif isinstance(content, list):
        for i, value in enumerate(content):
            for inner in poisonings(value, poison):
                yield [*content[:i], inner, *content[i + 1 :]]


class Alien(HTMLParser):
    """Notes tags that no page of ours has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag == "img" or any(name.startswith("on") for name, _ in attrs):
            self.found.append(str(self.get_starttag_text()))


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config.yaml is read again only where it is another one: it takes most of the time of a page."""
    known: dict[bytes, RunConfig] = {}

    def read(folder: Path) -> RunConfig:
        text = (folder / "config.yaml").read_bytes()
        if text not in known:
            known[text] = config_of_run(folder)
        return known[text]

    monkeypatch.setattr(run_facts, "config_of_run", read)


@pytest.mark.usefixtures("read_once")
def test_no_string_of_any_file_becomes_code(run: Path) -> None:
    """Every string of every file that a page is made of, one after the other."""
    pages = 0
    files = [p for p in run.rglob("*.json") if p.is_file()] + [run / "metrics.jsonl"]
    for file in files:
        original = file.read_text()
        last = original.splitlines()[-1] if file.suffix == ".jsonl" else original
        for content in poisonings(json.loads(last) | ({"skipped": "why"} if file.suffix == ".jsonl" else {})):
            file.write_text(original.removesuffix(last + "\n") + json.dumps(content) + "\n")
            facts = gather_facts(run)
            seen = Alien()
            seen.feed(html_page(facts))
            assert (seen.found, seen.scripts) == ([], 1), (file.name, content)
            text = markdown_page(facts).partition("### Reproduce")[0]
            assert "<img" not in text, (file.name, content)
            pages += 1
        file.write_text(original)
    assert pages > 100
