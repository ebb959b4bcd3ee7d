"""Every HTML page that the package writes, in a real browser: whatever stands in a run's files or a set's rows is text."""

from __future__ import annotations

import contextlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_longft.errors import ConfigError
from ds_longft.tools.look.html import page as data_page
from ds_longft.tools.look.statistics import Group, Packs, PairLengths, Retention, Statistics
from ds_longft.tools.report.page import comparison_page, html_page
from ds_longft.tools.report.run_facts import gather_facts
from tests.unit.tools.report.test_report import poisonings, read_once, run

__all__ = ["read_once", "run"]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

CALL = "parent.postMessage(0,String.fromCharCode(42))"
POISON = (
    f"""x"'`>--></title></style></script></pre></textarea></svg><img src=x onerror={CALL}><script>{CALL}</script>"""
    f"""<svg onload={CALL}><a href=javascript:{CALL} autofocus onfocus={CALL}>|``` $\\bad{{$ x"""
)
"""Closes whatever it may stand in and calls the page around it; `$`: a formula that a picture's text cannot hold."""

# One page after the other in a frame; who calls from inside is noted.
DRIVER = """<!doctype html><title>begun</title><iframe></iframe><script>
const pages = %s, frame = document.querySelector('iframe');
let now = -1, called = [];
onmessage = () => called.push(pages[now]);
frame.onload = () => setTimeout(next, 20);
function next() {
  now += 1;
  if (now < pages.length) { frame.src = pages[now]; return; }
  document.title = `seen ${pages.length}, called by ${JSON.stringify([...new Set(called)])}`;
}
next();
</script>"""


def called_by(folder: Path, pages: Iterable[str]) -> list[int]:
    """Numbers of the pages that ran something of what they show."""
    names = []
    for number, text in enumerate(pages):
        (folder / f"{number}.html").write_text(text)
        names.append(f"{number}.html")
    (folder / "driver.html").write_text(DRIVER % json.dumps(names))
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/browser"]
    command += ["--virtual-time-budget=600000", "--dump-dom", f"file://{folder}/driver.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    seen = re.search(r"<title>seen (\d+), called by (\[.*?\])</title>", dom)
    assert seen is not None, dom[-2000:]
    assert int(seen[1]) == len(names) > 0
    return [int(name.removesuffix(".html")) for name in json.loads(seen[2])]


def test_the_browser_would_notice(tmp_path: Path) -> None:
    ways = [
        POISON, f'<p title="{POISON}">', f"<p title={POISON}>", f"<style>{POISON}</style>", f"<script>'{POISON}'</script>", f"<title>{POISON}",
    ]  # fmt: skip
    assert called_by(tmp_path, [*ways, "<p>quiet</p>"]) == list(range(len(ways)))


def poisoned_files(run: Path) -> Iterator[tuple[Path, str]]:
    """(file, its content with one string poisoned), for every string, key or value, of every file a page is made of."""
    for file in sorted(run.rglob("*.json")):
        for content in poisonings(json.loads(file.read_text()), POISON):
            yield file, json.dumps(content)
    records = run / "metrics.jsonl"
    *before, last = records.read_text().splitlines(keepends=True)
    for content in poisonings(json.loads(last) | {"skipped": "why"}, POISON):
        yield records, "".join(before) + json.dumps(content) + "\n"
    config = run / "config.yaml"
    for content in poisonings(yaml.safe_load(config.read_text()), POISON):
        yield config, yaml.safe_dump(content)
    yield config, POISON


def poisoned_pages(run: Path) -> Iterator[str]:
    for file, text in poisoned_files(run):
        original = file.read_text()
        file.write_text(text)
        with contextlib.suppress(ConfigError):  # a config.yaml that is none is refused
            yield html_page(gather_facts(run))
        file.write_text(original)
    name = POISON.replace("/", "\u2215")  # what a file's name may hold
    (run / f"checkpoint-{name[:200]}").mkdir()
    (run / "run_status.json").write_text(json.dumps({"exit_code": 1, "error": POISON}))
    for file in list((run / "eval").iterdir()):
        file.rename(file.with_name(f"{name[:200]}-{file.name}"))
    yield html_page(gather_facts(run))
    yield html_page(gather_facts(run.rename(run.with_name(name[:240]))))


@pytest.mark.usefixtures("read_once")
def test_no_string_of_any_file_of_a_run_becomes_code(run: Path, tmp_path: Path) -> None:
    (run / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (tmp_path / "pages").mkdir()
    pages = list(poisoned_pages(run))
    assert len(pages) > 200
    shown = sum("&lt;img src=x" in page for page in pages)
    assert shown > len(pages) / 4, "most of what is poisoned is to be seen"
    assert called_by(tmp_path / "pages", pages) == []


def statistics(word: Callable[[str], str] = str) -> Statistics:
    """Of a set whose names are what `word` makes of them."""
    group = Group(word("a.jsonl"), 10, 500, 100, 50, 70, 0.5)
    return Statistics(
        total=group, sources=[group, replace(group, name=word("b.jsonl"))], languages=[replace(group, name=word("en"))],
        bounds=[64, 128], by_source={word("a.jsonl"): [4, 6], word("b.jsonl"): [5, 5]}, by_language={word("en"): [9, 11]}, tokens_by_length=[200, 300],
        packs=Packs(256, word("none"), 4, 2, 0.5, 2.5, 0, 1.0, 0.1, 36_000), pack_tokens=[100, 120, 130, 150],
        left_out={word("too long"): 1}, first_left_out={word("too long"): word("a.jsonl:3: seen 9")}, truncated=0,
        fingerprint=word("abc"), unused={word("tools"): 3}, retention=[Retention(4096, 1.0, 1.0)],
        pairs=PairLengths(100, 50, 40, 0.6),
    )  # fmt: skip


def test_no_name_of_a_set_becomes_code(tmp_path: Path) -> None:
    poisoned = statistics(lambda word: word + POISON)
    pages = [data_page(statistics(), title="t", note="n"), data_page(poisoned, title=POISON, note=POISON)]
    assert pages[1].count("&lt;img src=x") >= 10
    assert called_by(tmp_path, pages) == []


AXE = """<!doctype html><title>begun</title>%s<script>
const script = %s;
onload = async () => {
  const seen = {};
  for (const frame of document.querySelectorAll('iframe')) {
    const page = frame.contentWindow, added = page.document.createElement('script');
    added.textContent = script;
    page.document.head.append(added);
    const found = await page.axe.run();
    seen[frame.name] = [found.passes.length, found.violations.map(v => [v.id, v.nodes[0].html])];
  }
  document.title = 'seen ' + JSON.stringify(seen);
};
</script>"""


@pytest.mark.parametrize("scheme", [1, pytest.param(0, marks=pytest.mark.slow)], ids=["light", "dark"])
def test_axe_finds_nothing(scheme: int, run: Path, tmp_path: Path) -> None:
    """Names, roles, contrast, keyboard: what axe-core can tell of each page, on a screen and on a phone."""
    axe = files(pytest.importorskip("axe_core_python")).joinpath("axe.min.js").read_text()
    pages = {
        "run": html_page(gather_facts(run)),
        "compare": comparison_page([gather_facts(run), gather_facts(run)]),
        "data": data_page(statistics(), title="Training data", note="two sources"),
    }
    frames = ""
    for kind, text in pages.items():
        (tmp_path / f"{kind}.html").write_text(text)
        for width in (1200, 390):
            frames += (
                f'<iframe name="{kind} {width}" src="{kind}.html" style="width: {width}px; height: 900px"></iframe>'
            )
    (tmp_path / "axe.html").write_text(AXE % (frames, json.dumps(axe).replace("</", "<\\/")))
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=600000", f"--user-data-dir={tmp_path}/browser", "--dump-dom"]
    command += [f"--blink-settings=preferredColorScheme={scheme}"]
    done = subprocess.run(
        [*command, f"file://{tmp_path / 'axe.html'}"], capture_output=True, text=True, timeout=240, check=True
    )
    title = re.search(r"<title>seen (.*?)</title>", done.stdout)
    assert title is not None, done.stdout[-2000:]
    seen = json.loads(html.unescape(title[1]))
    assert len(seen) == 2 * len(pages)
    assert min(passes for passes, _ in seen.values()) > 15, "it looked at something"
    assert {name: violations for name, (_, violations) in seen.items() if violations} == {}


def test_every_page_fits_a_phone(run: Path, tmp_path: Path) -> None:
    """Nothing is wider than the window, long names included: what is scrolls inside its own box."""
    long: Any = "x" * 200
    pages = {
        "run": html_page(gather_facts(run)),
        "data": data_page(statistics(lambda word: word + long), title=long, note=long),
    }
    frames = ""
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text.replace("<details>", "<details open>"))
        frames += f'<iframe src="{name}.html" style="width: 390px; border: 0"></iframe>'
    measure = "document.title = [...document.querySelectorAll('iframe')].map(f => f.contentDocument.documentElement.scrollWidth)"
    (tmp_path / "phone.html").write_text(f'<body onload="{measure}">{frames}</body>')
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path}/browser", "--dump-dom", f"file://{tmp_path / 'phone.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    widths = re.search(r"<title>([\d,]+)</title>", dom)
    assert widths is not None, dom[-2000:]
    assert [int(width) <= 390 for width in widths[1].split(",")] == [True, True], widths[1]
