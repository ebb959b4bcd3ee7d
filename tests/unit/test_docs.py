"""What the documentation shows is what the program takes: commands parse, files exist, references are the code's."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_longft.cli import COMMANDS
from ds_longft.cli import main as cli
from ds_longft.command_line import bind
from ds_longft.config.read import load_run_config
from ds_longft.config.yaml_io import load_yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
HEADINGS = re.compile(r"^#+ (.*)$", re.MULTILINE)
BLOCKS = re.compile(r"```\n(.*?)```", re.DOTALL)
TRAIN = re.compile(r"(?:launch/train\.py|ds_longft\.train)\b(.*)")


def commands(page: Path) -> list[str]:
    """Lines of the page's code blocks that start a program of ours, comments taken off."""
    lines = "\n".join(BLOCKS.findall(page.read_text())).replace("\\\n", " ").splitlines()
    starts = ("ds-longft ", "deepspeed ", "torchrun ", "srun ", "python ", "make ")
    return [line.partition(" #")[0].strip() for line in lines if line.startswith(starts)]


def all_commands() -> list[str]:
    return list(dict.fromkeys(line for page in PAGES for line in commands(page)))


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the mine.yaml that README.md makes."""
    monkeypatch.chdir(tmp_path)
    line = next(line for line in commands(ROOT / "README.md") if line.startswith("ds-longft config "))
    assert cli(shlex.split(line.partition(">")[0])[1:]) == 0
    for name in ("mine.yaml", "my.yaml", "run.yaml"):
        (tmp_path / name).write_text(capsys.readouterr().out if name == "mine.yaml" else "{}")
    return tmp_path


@pytest.mark.parametrize("line", all_commands())
def test_a_command_of_the_documentation_is_taken(line: str, user_folder: Path) -> None:
    words = shlex.split(line.partition(">")[0])
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "ds-longft":
        name = next(n for n in COMMANDS if words[1:][: len(n.split())] == n.split())
        rest = words[1 + len(name.split()) :]
        module, _, function = COMMANDS[name].target.partition(":")
        values = bind(getattr(importlib.import_module(module), function), name, rest).arguments
        if isinstance(values.get("config"), tuple):
            made_by_the_reader(values["config"], user_folder)
            load_run_config(values["config"])
    elif match := TRAIN.search(line.partition(">")[0]):
        words = tuple(shlex.split(match[1]))
        made_by_the_reader(words, user_folder)
        load_run_config(words)


def made_by_the_reader(words: tuple[str, ...], folder: Path) -> None:
    """A run config of the page that an earlier command, or the reader, has made."""
    for path in (folder / word for word in words if word.endswith(".yaml") and not (ROOT / word).exists()):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()


def test_there_are_commands_to_look_at() -> None:
    assert sum(line.startswith(("deepspeed", "torchrun", "srun", "python")) for line in all_commands()) > 6


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_names_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    shipped = re.findall(
        r"\b(?:ds_configs|recipes|docs|launch|benchmarks|examples)/[\w./-]+\.(?:jsonl?|yaml|md|py|sh|sbatch)", text
    )
    made_later = {"benchmarks/results.jsonl"}
    missing = [name for name in links if not (page.parent / name).exists()]
    missing += [name for name in shipped if name not in made_later and not (ROOT / name).exists()]
    assert missing == []


def test_the_tree_of_the_documentation_is_the_tree() -> None:
    tree = re.search(r"## The tree\n\n```\n(.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL)
    assert tree is not None
    folders, seen = [ROOT], set()
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path = folders[depth] / line.split()[0]
        assert path.exists(), line
        folders[depth + 1 :] = [path]
        seen.add(path)
    places = [p for folder in ("ds_longft", "ds_longft/tools") for p in (ROOT / folder).iterdir()]
    modules = {p for p in places if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert {p for p in modules if p.name != "__init__.py"} <= seen


@pytest.mark.parametrize(
    ("function", "page"),
    [
        ("config_page", "docs/config.md"),
        ("data_page", "docs/data.md"),
        ("models_page", "docs/models.md"),
        ("readme_page", "README.md"),
        ("speed_page", "docs/speed.md"),
        ("migrating_page", "docs/migrating.md"),
        pytest.param("gpus_page", "docs/gpus.md", marks=pytest.mark.slow),  # a minute of plans
        pytest.param("small_cards_page", "docs/small_cards.md", marks=pytest.mark.slow),
    ],
)
def test_references_are_up_to_date(function: str, page: str) -> None:
    made = runpy.run_path(str(ROOT / "docs/make_reference.py"))[function]()
    assert made == (ROOT / page).read_text(), "run `make docs`"


def test_every_page_is_in_the_site_and_in_the_index() -> None:
    pages = {path.name for path in ROOT.glob("docs/*.md")}
    nav = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    assert set(re.findall(r"[\w.]+\.md", nav)) == pages
    assert set(re.findall(r"\]\((\w+\.md)", (ROOT / "docs/index.md").read_text())) == pages - {"index.md"}


def test_anchors_of_links_are_headings() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*\.md)?#([^)]+)\)", page.read_text()):
            text = ((page.parent / target) if target else page).read_text()
            headings = [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in HEADINGS.findall(text)]
            assert anchor in headings, f"{page.name}: {target}#{anchor}"


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_the_container_files_are_linted_and_do_the_same() -> None:
    subprocess.run(["hadolint", str(ROOT / "launch/Dockerfile")], check=True)
    docker, apptainer = (ROOT / "launch/Dockerfile").read_text(), (ROOT / "launch/apptainer.def").read_text()
    for line in re.findall(r"^RUN (apt-get.*)$", docker, re.MULTILINE):
        assert line in apptainer
    assert re.findall(r"^FROM (.*)$", docker, re.MULTILINE) == re.findall(r"^From: (.*)$", apptainer, re.MULTILINE)


def test_yaml_of_the_documentation_is_a_run_config() -> None:
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            assert isinstance(load_yaml(block), dict)


def test_the_site_is_built_and_no_link_of_it_is_dead(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    links = [
        (page.name, link)
        for page in tmp_path.glob("*.html")
        for link in re.findall(r'<a [^>]*href="([^"#:]+)[^":]*"', page.read_text())
    ]
    assert len(links) > 500
    assert [(page, link) for page, link in links if page != "404.html" and not (tmp_path / link).exists()] == []


def test_the_package_index_shows_no_link_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    text = given["long_description"]
    assert re.findall(r"\]\((?!https://)[^)]*", text) == []
    assert "docs/install.md" in text


OF_OTHERS = ("system error", "CUDA out of memory", "return code", "ModuleNotFoundError", "is_gradient_checkpointing")


def test_messages_one_looks_up_are_those_that_are_said() -> None:
    """Of each message that the page quotes as ours, the words between numbers and names stand in the code."""
    code = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "ds_longft").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts over several lines
    rows = [line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| ")]
    quoted = [text for row in rows[1:] for text in re.findall("`([^`]+)`", row.split(" | ")[0])]
    ours = [text for text in quoted if not any(words in text for words in OF_OTHERS)]
    assert len(ours) > 12
    for text in ours:
        for words in re.split(r"\d+|'[^']*'|\.\.\.|^N problems", text):
            assert words.strip(" ,:") in code, text


IMPORTED = re.compile(r"from (ds_longft[\w.]*) import ([\w, ]+)")
SCRIPTS = [*ROOT.glob("*/*.sh"), *ROOT.glob("*/*/*.sh"), *ROOT.glob("*/*.sbatch"), ROOT / "Makefile", *PAGES]


@pytest.mark.parametrize("path", [p for p in SCRIPTS if IMPORTED.search(p.read_text())], ids=lambda p: p.name)
def test_what_a_script_imports_is_there(path: Path) -> None:
    """Shell scripts and pages hold lines of Python that no type checker sees."""
    for module, names in IMPORTED.findall(path.read_text()):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{path}: {module} has no {name.strip()}"
