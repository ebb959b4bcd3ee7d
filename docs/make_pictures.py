"""Makes docs/assets/: screenshots of every page, the README's picture of a result, a recording of a terminal.

`python docs/make_pictures.py`, on Linux with Chromium; nothing is drawn by hand. The result is that of the run in
examples/extend_smollm2, whose page is made too; the statistics are of Python's own library; commands run in a terminal.
`python docs/make_pictures.py quickstart` records the README's first command in a fresh clone, with a home of its own.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image

from ds_longft.tools.report.command import write_report
from ds_longft.tools.report.page import html_page
from ds_longft.tools.report.run_facts import gather_facts

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "docs" / "assets"
EXAMPLE = ROOT / "examples" / "extend_smollm2" / "lora_yarn"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHADES = 256  # of a picture's palette
COLUMNS = 104  # of the terminal
COMMANDS = (
    "ds-longft config --base_model Qwen/Qwen3-8B --sequence_len 128K --sp_size 8 --lora_rank 16",
    "ds-longft config --model.path Qwen/Qwen3-8B --data.train my.jsonl --data.max_length_tokens 64K --sp 8",
    "ds-longft plan SmolLM2-135M-Instruct --gpus 2 --gpu h100-80 --length 8K",
    "ds-longft check recipes/quickstart.yaml --gpus 2",
)


TERMINAL = "ds-longft in a terminal: mistakes named, a run config, a plan, a check"
QUICKSTART = "make quickstart in a terminal: installed, trained for 12 steps, the held-out loss before and after"
BARS = "━━"


def shoot(page: str, name: str, width: int, height: int, *, dark: bool = False) -> None:
    """One screen of a page as docs/assets/NAME.png."""
    assert BROWSER is not None, "no Chromium is installed"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(page, encoding="utf-8")
        frame = f"<body style='margin:0'><iframe src=page.html style='border:0;width:{width}px;height:{height}px'>"
        (Path(folder) / "frame.html").write_text(frame)
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder}/b",
        ]
        options += [f"--window-size={max(width, 600)},{height + 200}", f"--screenshot={folder}/shot.png"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        subprocess.run([BROWSER, *options, f"file://{folder}/frame.html"], check=True, capture_output=True, timeout=120)
        picture = Image.open(f"{folder}/shot.png").convert("RGB").crop((0, 0, width, height))
    ASSETS.mkdir(exist_ok=True)
    # This method keeps rare colours, those of lines.
    picture.quantize(SHADES, method=Image.Quantize.MAXCOVERAGE).save(ASSETS / f"{name}.png", optimize=True)


def result_page() -> str:
    """Before and after of the example, the pictures that its page begins with: loss by position, numbers found."""
    page = html_page(gather_facts(EXAMPLE))
    chart, after_chart = page[page.index("<div class=pair>") :], "</table></div></div></div>"
    pictures = chart[: chart.index(after_chart) + len(after_chart)]
    style = files("ds_longft.tools.pages").joinpath("page.css").read_text("utf-8")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><style>{style} output {{ display: none }}'
        "body { padding: 1rem }</style><body><h1>A window of 8,192 tokens stretched to 131,072</h1>"
        f"{pictures}</body></html>"
    )


def recorded(commands: Sequence[str], folder: Path, **environment: str) -> list[tuple[float, str]]:
    """(seconds since its command began, line) of commands run in a terminal; a command's own line is at 0."""
    lines = []
    for command in commands:
        lines.append((0.0, f"$ {command}"))
        child, terminal = pty.fork()
        if child == 0:
            os.chdir(folder)
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            more = {"COLUMNS": str(COLUMNS), "TERM": "dumb", "NO_COLOR": "1", "PATH": path, **environment}
            os.execvpe("bash", ["bash", "-c", command], {**os.environ, **more})
        begun, chunks = time.monotonic(), []
        while chunk := _read(terminal):
            chunks.append((time.monotonic() - begun, chunk.decode(errors="replace")))
        os.waitpid(child, 0)
        os.close(terminal)
        lines += [*as_lines(chunks, environment.get("HOME", str(Path.home()))), (0.5, "")]
    return lines


def as_lines(chunks: Iterable[tuple[float, str]], home: str) -> list[tuple[float, str]]:
    """What stays on a screen of `COLUMNS`: colours and bars, which are drawn over, do not. `home` is shown as ~."""
    lines, text = [], ""
    for seconds, chunk in chunks:
        *whole, text = (text + chunk).split("\n")
        for line in whole:
            drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).replace(home, "~").split("\r")
            kept = [part.rstrip() for part in drawn if part.strip() and BARS not in part] or [""]
            kept = kept if any(kept) or (lines and lines[-1][1]) else []  # one blank line is enough
            lines += [(seconds, part[i : i + COLUMNS]) for part in kept for i in range(0, max(1, len(part)), COLUMNS)]
    return lines


def quickstart() -> None:
    """The README's first command, from a clone to the end; paths are shown as a user would have them."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "home"
        clone = home / "ds_longft"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        lines = recorded(["make quickstart"], clone, HOME=str(home), PATH="/usr/local/bin:/usr/bin:/bin")
    (ASSETS / "quickstart.svg").write_text(terminal_svg(lines, QUICKSTART), encoding="utf-8")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def terminal_svg(lines: Sequence[tuple[float, str]], name: str) -> str:
    """The recording as an SVG that plays by itself: each line comes when it came, waits are at most two seconds."""
    shown, at, last = [], 0.0, 0.0
    for number, (seconds, line) in enumerate(lines):
        at += min(2.0, max(0.05, seconds - last)) if seconds else 0.8
        last = seconds
        kind = ' class="p"' if line.startswith("$ ") else ""
        y = 24 + 17 * number
        shown.append(f'<text x="12" y="{y}"{kind} style="animation-delay:{at:.1f}s">{escape(line)}</text>')
    height = 24 + 17 * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {8 * COLUMNS + 24} {height}" role="img" '
        f'aria-label="{escape(name)}"><style>'
        "svg{background:#0d1117}text{font:13px ui-monospace,monospace;fill:#e6edf3;white-space:pre;"
        "animation:a .01s both}.p{fill:#7ee787;font-weight:600}@keyframes a{from{opacity:0}to{opacity:1}}"
        "@media (prefers-reduced-motion){text{animation:none}}</style>"
        f'<rect width="100%" height="100%" fill="#0d1117"/>{"".join(shown)}</svg>\n'
    )


def library(folder: Path) -> str:
    """Two sets of texts as long as source files are, as `data.train` takes them."""
    home = Path(sysconfig.get_path("stdlib"))
    for name, paths in (("modules", home.glob("*.py")), ("packages", home.glob("[a-j]*/*.py"))):
        texts = (path.read_text("utf-8", errors="replace") for path in sorted(paths) if path.stat().st_size)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return '[{"path":"modules.jsonl"},{"path":"packages.jsonl"}]'


def main() -> None:
    """Everything, a line for each file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for given in ("recipes", "ds_configs"):
            (folder / given).symlink_to(ROOT / given)
        (folder / "my.jsonl").write_text('{"text": "a"}\n')
        (folder / "SmolLM2-135M-Instruct").symlink_to(
            Path("~/.cache/ds_longft/quickstart/SmolLM2-135M-Instruct").expanduser()
        )
        ASSETS.mkdir(exist_ok=True)
        shown = terminal_svg(recorded(COMMANDS, folder), TERMINAL)
        (ASSETS / "terminal.svg").write_text(shown, encoding="utf-8")
        keys = f"--model.path SmolLM2-135M-Instruct --data.train {library(folder)} --data.max_length_tokens 8K".split()
        stats = [sys.executable, "-m", "ds_longft.cli", "data", "stats", "--html", "s.html", *keys]
        subprocess.run(stats, cwd=folder, check=True, capture_output=True)
        facts = replace(gather_facts(EXAMPLE), folder=EXAMPLE.relative_to(ROOT))  # as its commands name it
        write_report(facts, EXAMPLE.with_name("report.html"))
        pages = {"report": html_page(facts), "stats": (folder / "s.html").read_text("utf-8")}
    shoot(result_page(), "result", 1000, 330)
    for name, page in pages.items():
        shoot(page, f"{name}-wide", 1100, 900)
        shoot(page, f"{name}-dark", 1100, 900, dark=True)
        shoot(page, f"{name}-phone", 390, 800)
    for file in sorted(ASSETS.iterdir()):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    quickstart() if sys.argv[1:] == ["quickstart"] else main()
