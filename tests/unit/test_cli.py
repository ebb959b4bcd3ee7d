"""The `ds-longft` command: nothing runs unless every argument fits."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from ds_longft import __version__, cli
from ds_longft.cli import COMMANDS, Command, main
from ds_longft.command_line import RunKeys, _docstring, _parameters, as_words, bind, described
from ds_longft.config.messages import all_keys
from ds_longft.config.read import dump_config, load_run_config
from ds_longft.config.yaml_io import load_yaml
from ds_longft.errors import EXIT_CONFIG, EXIT_UNCHECKED, DataError, LongftError
from ds_longft.tools import doctor
from ds_longft.tools.evaluate.flags import Flags

CALLS: list[dict[str, Any]] = []


def pack(
    path: str, out: str = "packs", *, max_tokens: int = 8, mode: Literal["fit", "none"] = "fit", json: bool = False
) -> None:
    """Lay rows into packs.

    Args:
        path: What to read.
        out: Where to write.
        max_tokens: Budget of a pack in tokens.
        mode: How.
        json: Print JSON.
    """
    CALLS.append({"path": path, "out": out, "max_tokens": max_tokens, "mode": mode, "json": json})


def fail(path: str) -> None:
    """Fail as a command does."""
    raise DataError(f"{path} holds nothing")


def cut(tokens: int | str = "4K") -> None:
    """Take a number or a word."""
    CALLS.append({"tokens": tokens})


def join(first: str, *more: str) -> None:
    """Take any number of words."""
    CALLS.append({"first": first, "more": more})


def look(config: RunKeys, *, dp: int = 1, depth: int = 1, json: bool = False) -> None:
    """Take a run config."""
    CALLS.append({"config": config, "dp": dp, "json": json})


@pytest.fixture(autouse=True)
def _commands(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    for name in ("pack", "fail", "cut", "join", "look"):
        monkeypatch.setitem(cli.COMMANDS, f"test {name}", Command(f"{__name__}:{name}", f"{name} for tests"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a.jsonl"], {"path": "a.jsonl"}),
        (["a.jsonl", "--out", "b"], {"path": "a.jsonl", "out": "b"}),
        (["--path", "a.jsonl", "--max-tokens=16"], {"path": "a.jsonl", "max_tokens": 16}),
        (["--json", "a.jsonl"], {"path": "a.jsonl", "json": True}),  # fire alone would read json="a.jsonl"
        (["2024", "--out=1e3"], {"path": "2024", "out": "1e3"}),  # fire alone would make numbers of them
        (["a", "--mode", "none"], {"path": "a", "mode": "none"}),
        (["it's [1,2]"], {"path": "it's [1,2]"}),
        (["a", "--out", "x y"], {"path": "a", "out": "x y"}),
    ],
)
def test_arguments_reach_the_command(arguments: list[str], expected: dict[str, Any]) -> None:
    assert main(["test", "pack", *arguments]) == 0
    defaults = {"out": "packs", "max_tokens": 8, "mode": "fit", "json": False}
    assert [defaults | expected] == CALLS


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "--max_token", "3"], "no flag --max_token: did you mean --max_tokens?"),
        (["a", "--jsn"], "no flag --jsn: did you mean --json?"),
        (["a", "-z"], "no flag -z: known are --path, --out, --max_tokens, --mode, --json"),
        (["a", "b", "c"], "argument 'c' is one too many: it takes PATH"),
        ([], "PATH is missing: it takes PATH"),
        (["a", "--out"], "--out needs a value"),
        (["a", "--out", "--json"], "--out needs a value"),
        (["a", "--max_tokens", "many"], "--max_tokens: seen 'many'"),
        (["a", "--mode", "fat"], "--mode: seen 'fat'"),
        (["a", "--json=maybe"], "ignored explicit argument 'maybe'"),
    ],
)
def test_mistakes_refuse_before_anything_runs(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", "pack", *arguments]) == EXIT_CONFIG
    assert not CALLS
    printed = capsys.readouterr()
    assert expected in printed.err
    assert "Traceback" not in printed.err


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str], *, alone: bool) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupted)
    assert main(["doctor"]) == 130
    assert "the same command uses what was finished" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_traceback() -> None:
    line = f"{shlex.quote(sys.executable)} -m ds_longft.cli docs config | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "# Run config\n"
    assert done.stderr == ""


def test_every_mistake_is_listed_at_once() -> None:
    with pytest.raises(LongftError) as caught:
        bind(pack, "pack", ["--jsn", "--moed", "fit", "--out"])
    assert all(word in str(caught.value) for word in ("--jsn", "--moed", "--out needs a value", "PATH is missing"))


@pytest.mark.parametrize(("word", "value"), [("4096", 4096), ("128K", "128K")])
def test_a_number_stays_a_number_where_both_are_taken(word: str, value: int | str) -> None:
    assert main(["test", "cut", "--tokens", word]) == 0
    assert [{"tokens": value}] == CALLS


def test_any_number_of_words() -> None:
    assert main(["test", "join", "a", "b", "c"]) == 0
    assert CALLS == [{"first": "a", "more": ("b", "c")}]


def test_an_error_of_the_command_is_a_message_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "fail", "rows.jsonl"]) == DataError.exit_code
    assert capsys.readouterr().err == "rows.jsonl holds nothing\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["exprt"], "no command 'exprt': did you mean `ds-longft export`?"),
        (["data", "tokenise"], "did you mean `ds-longft data tokenize`?"),
        (["qqq"], "`ds-longft --help` lists the commands"),
        (["--verbose"], "no command '--verbose'"),
    ],
)
def test_unknown_commands(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == EXIT_CONFIG
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_and_an_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "example" in text


def test_help_of_a_group_and_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    assert "data tokenize" in capsys.readouterr().out
    assert main(["test", "pack", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Budget of a pack in tokens (default 8)" in text
    assert "ds-longft test pack PATH" in text
    assert not CALLS


@pytest.mark.parametrize("group", ["data", "data synth", "eval", "eval longbench", "slurm"])
@pytest.mark.parametrize("asked", [[], ["--help"], ["-h"]])
def test_groups_at_any_depth_list_their_commands(
    group: str, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*group.split(), *asked]) == 0
    text = capsys.readouterr().out
    listed = [name for name in COMMANDS if f"  {name} " in text]
    assert listed == [name for name in COMMANDS if name.startswith(f"{group} ")]


def test_help_shows_choices_numbers_and_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["plan", "-h"]) == 0
    text = capsys.readouterr().out
    assert "usage: ds-longft plan [MODEL] [--key value ...] [options]" in text
    assert "--objective {sft,dpo}" in text
    assert "--gpus N " in text
    assert "GPUs of one node (default 8)" in text
    assert "example:\n  ds-longft plan " in text


def test_a_run_config_is_a_file_and_keys_behind_it() -> None:
    words = ["mine.yaml", "--data.train", "a.jsonl", "--dp", "2", "--sp", "4", "--json"]
    assert main(["test", "look", *words]) == 0
    assert CALLS == [{"config": ("mine.yaml", "--data.train", "a.jsonl", "--sp", "4"), "dp": 2, "json": True}]
    assert as_words(CALLS[0]) == ["mine.yaml", "--data.train", "a.jsonl", "--sp", "4", "--dp=2", "--json"]


def test_a_mistyped_flag_is_no_run_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "look", "mine.yaml", "--dpth", "3"]) == EXIT_CONFIG
    assert "no flag --dpth: did you mean --depth?" in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["--version", "version"])
def test_version(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([asked]) == 0
    assert capsys.readouterr().out == f"ds-longft {__version__}\n"


@pytest.mark.parametrize("given", [["recipes/sft_full_64k.yaml"], ["--config", "recipes/sft_lora_yarn.yaml"], []])
def test_config_writes_what_differs_and_reads_it_back(
    given: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", *given, "--optim.learning_rate", "3e-5", "--lora", "null"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    expected = load_run_config([*given, "--optim.learning_rate", "3e-5", "--lora", "null"])
    assert load_run_config(str(tmp_path / "mine.yaml")) == expected
    assert "  # Peak" in text or "# " in text
    assert "betas" not in text


def test_config_prints_a_config_that_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--sp", "4", "--lora", "null", "--all"]) == 0
    printed = capsys.readouterr().out
    assert load_run_config(["--sp", "4", "--lora", "null"]).model_dump(mode="json") == load_yaml(printed)


def test_config_names_what_is_not_here_and_writes_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["config", "--model.path", "./nomodel", "--data.train", str(tmp_path / "none.jsonl")]) == 0
    printed = capsys.readouterr()
    assert "path: ./nomodel" in printed.out
    assert "note: model.path: there is no ./nomodel" in printed.err
    assert "none.jsonl" in printed.err
    assert main(["config"]) == 0
    assert "note: model.path is empty" in capsys.readouterr().err


def test_config_names_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--spp", "4"]) == EXIT_CONFIG
    assert "unknown key spp: did you mean sp?" in capsys.readouterr().err


def test_check_finds_what_a_start_would(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = ["--model.path", str(tmp_path / "none"), "--data.train", str(tmp_path / "rows.jsonl"), "--sp", "3"]
    assert main(["check", *keys, "--gpus", "8"]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert all(key in said for key in ("model.path", "data.train", "sp is 3"))


def test_check_says_what_it_could_not_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    keys = [
        "--model.path",
        "Qwen/Qwen3-8B",
        "--data.train",
        str(tmp_path / "rows.jsonl"),
        "--output_dir",
        str(tmp_path),
    ]
    assert main(["check", *keys, "--gpus", "8"]) == EXIT_UNCHECKED
    said = capsys.readouterr().out
    assert "checked, but for the model: its config cannot be read here (window, heads and type are unchecked)" in said
    assert "ZeRO 3 asked (zero3_sp.json)" in said


def test_check_reads_the_config_of_a_hub_id_out_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "")
    monkeypatch.setattr("ds_longft.model.reach.check_reach", lambda *_: None)
    keys = ["--model.path", "org/model", "--data.train", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path)]
    assert main(["check", *keys, "--gpus", "8"]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert "sp is 8, but the model has 4 query heads" in said
    assert "the model's window is 4096 tokens" in said
    assert main(["check", *keys, "--gpus", "8", "--sp", "4", "--data.max_length_tokens", "4096"]) == 0


@pytest.mark.parametrize("known", [False, True])
def test_check_says_that_wandb_has_no_login(
    known: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    login = SimpleNamespace(login=lambda **asked: known and not asked["prompt"] and not asked["verify"])
    monkeypatch.setitem(sys.modules, "wandb", login)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    keys = ["--model.path", "a/b", "--data.train", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path)]
    for mode, said in (("online", not known), ("offline", False)):
        assert main(["check", *keys, "--log.wandb", mode, "--gpus", "8"]) == EXIT_UNCHECKED
        assert ("wandb: not logged in: run `wandb login`" in capsys.readouterr().out) is said
    monkeypatch.setattr(doctor, "_version_or_none", lambda name: "1")
    (found,) = doctor.tracking()
    assert (found.seen, found.mend[:17]) == (("logged in", "") if known else ("not logged in", "run `wandb login`"))


def test_train_refuses_before_it_starts_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ds_longft.tools.begin.launch_ranks", lambda *_, **__: pytest.fail("started"))
    assert main(["train", "--data.train", "rows.jsonl"]) == EXIT_CONFIG
    assert "model.path is empty" in capsys.readouterr().err, "and not the quickstart's model"


def test_train_ends_as_its_ranks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """75: stopped and saved."""
    monkeypatch.setattr("ds_longft.tools.begin._checked", lambda keys, ranks, on_gpu: ("checked", True))
    monkeypatch.setattr("ds_longft.tools.begin.launch_ranks", lambda *_, ranks, **__: 72 + ranks)
    with pytest.raises(SystemExit) as ended:
        main(["train", "mine.yaml", "--gpus", "3"])
    assert ended.value.code == 75


def test_the_package_has_what_python_users_import() -> None:
    import ds_longft

    names = re.findall(r"from ds_longft import (.+)", (Path(__file__).parents[2] / "docs/python.md").read_text())
    assert names
    for name in {name.strip() for line in names for name in line.split(",")}:
        assert getattr(ds_longft, name).__name__ == name
        assert name in dir(ds_longft)


def test_a_notebook_waits_for_no_torch_before_it_plans() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from ds_longft import ConfigError, LongftError, RunConfig, load_run_config, plan, train_from, verify\n"
        "print(load_run_config('recipes/quickstart.yaml').data.max_length_tokens)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1536\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_explains_its_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    module, _, attribute = COMMANDS[name].target.partition(":")
    function = getattr(importlib.import_module(module), attribute)
    about, explained = _docstring(function)
    for parameter in _parameters(function).values():
        assert parameter.name in explained or parameter.name in about, f"{name}: no docstring explains {parameter.name}"
        assert parameter.name.upper() in text or f"--{parameter.name}" in text, parameter.name
    assert main([*name.split(), "--no_such_flag_at_all", "1"]) == EXIT_CONFIG
    if COMMANDS[name].example:
        bind(function, name, shlex.split(COMMANDS[name].example))


LOADED = """
import sys
from pathlib import Path
from sysconfig import get_paths
before = set(sys.modules)  # an editable installation has a finder of its own
sys.argv = ["", *{words!r}]
try:
    {main}
except SystemExit as stop:
    assert not stop.code
places = get_paths()["purelib"], get_paths()["platlib"]
new = {{n: getattr(sys.modules[n], "__file__", None) or "" for n in set(sys.modules) - before}}
print(sorted({{n.partition(".")[0] for n, f in new.items() if f.startswith(places)}} - {{"ds_longft"}}), file=sys.stderr)
"""
OF_ALL_KEYS = {
    "annotated_types",
    "dotenv",
    "pydantic",
    "pydantic_core",
    "pydantic_settings",
    "typing_extensions",
    "typing_inspection",
    "yaml",
    "_yaml",
}


def loaded(words: list[str], main: str = "from ds_longft.cli import main; main()") -> set[str]:
    """Packages that a help imports: what its time is spent on, on a slow disk too. It says nothing beside the help."""
    code = LOADED.format(words=[*words, "--help"], main=main)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr.count("\n") == 1, "quiet"
    return set(ast.literal_eval(done.stderr))


@pytest.mark.parametrize("name", ["", "data", *COMMANDS])
def test_help_takes_no_time(name: str) -> None:
    """A tenth of a second: no package at all."""
    assert loaded(name.split()) == set()


SILENT = """
import os, subprocess, sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import of them ends the command
os.execv = subprocess.Popen = None  # and so does the start of a process
sys.stdout = sys.stderr  # where it is said is another matter
from ds_longft.cli import main
for words in {words!r}:
    print("begun", *words, file=sys.stderr, flush=True)
    try:
        main(words)
    except Exception as error:
        print("ended", file=sys.stderr, flush=True)
"""


def test_no_command_imports_torch_in_silence(tmp_path: Path) -> None:
    """Two seconds to the first line: what takes longer, torch and transformers, is said before it is imported."""
    (tmp_path / "run").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    config = "recipes/quickstart.yaml --model.path run --data.train rows.jsonl"
    words = (
        "export run out", "chat run", "plan run", "eval needle run", f"check {config}", "docs install",
        f"train {config}", f"verify {config} --sp 2", f"plan {config}", "eval perplexity run --sp 2", "data inspect " + config,
        f"config {config}", "migrate rows.jsonl", "models", "models run", "doctor", f"data tokenize {config}", "eval longbench score run", "report run", f"slurm render {config}",
        f"data stats {config}",  # the last: it puts torch back where it can be found, for a model's sizes
    )  # fmt: skip
    asked = [line.split() for line in words]
    alone = {
        name: value for name, value in os.environ.items() if name != "RANK"
    }  # an earlier test may have been a rank
    done = subprocess.run(
        [sys.executable, "-c", SILENT.format(words=asked)], cwd=tmp_path, capture_output=True, text=True, check=True,
        timeout=120, env={**alone, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    parts = done.stderr.split("begun ")[1:]
    assert len(parts) == len(asked)
    for part in parts:
        line = part.splitlines()[1] if part.count("\n") > 1 else ""
        assert line != "ended", part


@pytest.mark.parametrize("words", ["data tokenize", "data stats", "data inspect"])
def test_rows_are_looked_at_without_torch(words: str, tokenizer: Any, tmp_path: Path) -> None:
    """Of a model that was asked for once: `data stats` reads its sizes off transformers' code, and keeps them."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a b", "completion": "c"}) + "\n")
    run = load_run_config(
        ["--model.path", "model", "--data.train", "rows.jsonl", "--data.max_length_tokens", "1K",
         "--data.cache_dir", "cache"]
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(dump_config(run))
    code = (
        "import sys; from ds_longft.cli import main; code = main()\n"
        "heavy = {'torch', 'deepspeed', 'peft', 'datasets', 'accelerate'}\n"
        "print(code, sorted(name for name in heavy if sys.modules.get(name)), file=sys.stderr)"
    )
    for first in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", code, *words.split(), "run.yaml", "--json"], cwd=tmp_path, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        assert done.stdout, done.stderr
        assert json.loads(done.stdout)
        seen = done.stderr.splitlines()
        assert seen[0] == f"ds-longft {words}: importing transformers ..."
        assert seen[-1] == "0 []" or (first and words == "data stats" and seen[-1].startswith("0 ['"))


def test_every_key_is_in_the_help_of_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--help"]) == 0
    shown = set(re.findall(r"^  --(\S+)$", capsys.readouterr().out, re.MULTILINE))
    sections = {key.rpartition(".")[0] for key in all_keys()}
    assert {key for key in all_keys() if key not in sections} <= shown


def test_the_help_of_training_takes_no_time() -> None:
    script = str(Path(__file__).resolve().parents[2] / "launch" / "train.py")
    program = f"import runpy; runpy.run_path({script!r}, run_name='__main__')"
    assert loaded([], program) <= OF_ALL_KEYS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_describes_the_function_itself(name: str) -> None:
    module, _, attribute = COMMANDS[name].target.partition(":")
    function, read = getattr(importlib.import_module(module), attribute), described(COMMANDS[name].target)
    assert inspect.signature(read) == inspect.signature(function, eval_str=True)
    assert read.__doc__ == function.__doc__


def test_words_of_a_started_process_hold_zero_and_leave_out_what_is_not_given() -> None:
    words = as_words({"model": "runs/m", "seed": 0, "flags": Flags(gpus=2, before=True)})
    given = [
        "--model=runs/m",
        "--seed=0",
        "--gpus=2",
        "--sp=1",
        "--kernel=auto",
        "--weights=auto",
        "--quantize=auto",
        "--batch_tokens=128K",
        "--before",
    ]
    assert words == given
