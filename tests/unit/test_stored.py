"""Whatever stands on disk may be garbage: mutations of every file a run leaves, read by everybody who reads them.

No traceback, no other numbers than those that were written, and no record lost behind a bad one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_longft.config.read import dump_config, load_run_config
from ds_longft.config.run_config import LogConfig
from ds_longft.data.cache import PartSeal, SealedSet, sealed_set
from ds_longft.data.ledger import Tally
from ds_longft.ranks.lock import HOLDER, _holder
from ds_longft.run_files import StatusFile
from ds_longft.stored import Unreadable, read_file
from ds_longft.tools.evaluate.results import Rows
from ds_longft.tools.report.markdown import markdown_page
from ds_longft.tools.report.page import html_page
from ds_longft.tools.report.run_facts import gather_facts
from ds_longft.tools.slurm.requeue import decide
from ds_longft.train.checkpoint import MANIFEST, STATE
from ds_longft.train.metrics import Records
from ds_longft.train.resume_rules import TrainState
from ds_longft.train.status import STATUS, crashed_before
from tests.faults.alone import find
from tests.unit.tools.report.test_report import needle_result, perplexity_result, read_once, step

__all__ = ["read_once"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WHOLE = [b"", b"null", b"5", b"[]", b"{}", b'""', b"\0" * 300, b"\xff\xfe{}", b"[" * 5000, b'{"a": 1', b"NaN", b"1e999"]


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    """The bytes after something happened to them."""
    how = draw(
        st.sampled_from(["whole", "cut", "nuls", "noise", "encoding", "value", "value", "drop", "add", "rename"])
    )
    if how == "whole":
        return draw(st.sampled_from(WHOLE))
    start = draw(st.integers(0, len(original) - 1))
    length = draw(st.integers(1, 40))
    if how == "cut":
        return original[:start]
    if how == "nuls":
        return original[:start] + b"\0" * length + original[start + length :]
    if how == "noise":
        return original[:start] + draw(st.binary(min_size=1, max_size=8)) + original[start + draw(st.integers(0, 8)) :]
    if how == "encoding":
        return original.decode().encode(draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig", "utf-7"])))
    content = json.loads(original)
    place = draw(st.sampled_from(places(content)[1:]))
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    if how == "value":
        inside[place[-1]] = draw(JSON)
    elif how == "drop":
        del inside[place[-1]]
    elif how == "add" and isinstance(inside, dict):
        inside[draw(st.text(max_size=8))] = draw(JSON)
    elif how == "rename" and isinstance(inside, dict):
        inside[draw(st.text(max_size=8))] = inside.pop(place[-1])
    return json.dumps(content).encode()


MANY = settings(
    max_examples=120, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def with_file(folder: Path, name: str, content: bytes, read: Callable[[Path], None]) -> None:
    """A copy of the folder with that file in it, read."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(shutil.copytree(folder, Path(temporary) / "run"))
        (copy / name).write_bytes(content)
        read(copy)


def state(number: int) -> TrainState:
    return TrainState(
        step=number, epoch=0, step_in_epoch=number, tokens_seen=9, total_steps=8, world=1, rows="r", order="o", trained="t",
        decides={"lora.r": 4, "optim.type": "adamw"}, may_change={"optim.betas": [0.9, 0.95]}, model={"rms_norm_eps": 1e-6},
        changes=[{"key": "optim.eps", "was": 1e-8, "now": 1e-6, "after_step": 2}],
    )  # fmt: skip


def write_checkpoint(folder: Path, number: int) -> None:
    path = folder / f"checkpoint-{number}"
    (path / "engine").mkdir(parents=True)
    (path / STATE).write_text(json.dumps(asdict(state(number))))
    (path / "engine" / "shard.pt").write_bytes(b"shard" * number)
    seals = {}
    for file in (STATE, "engine/shard.pt"):
        content = (path / file).read_bytes()
        seals[file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps({"step": number, "files": seals}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    (folder / "eval").mkdir(parents=True)
    for number in (4, 6):
        write_checkpoint(folder, number)
    config = load_run_config(["--model.path", "some/model", "--data.train", "a.jsonl", "--output_dir", str(folder)])
    (folder / "config.yaml").write_text(dump_config(config))
    records = [
        step(1),
        step(2),
        {"step": 2, "eval_loss": 1.5, "eval_targets": 7, "eval_s": 1.0},
        *map(step, range(3, 9)),
    ]
    part = {
        "rows": 4, "tokens": 100, "targets": 10, "target_share": 0.1, "median_tokens": 20, "longest_tokens": 60,
        "rows_up_to_tokens": {"32": 3, "64": 1}, "sources": {"a.jsonl": 4}, "languages": {"en": 4}, "fingerprint": "abc",
        "bad_rows": 1, "overlong_rows_dropped": 0, "truncated_rows": 0,
    }  # fmt: skip
    sample = {"origin": "a.jsonl:1", "tokens": 60, "before": "question", "trained": "the answer"}
    contents: dict[str, Any] = {
        "versions.json": {"versions": {"torch": "2"}, "machine": {"device": "CPU", "cores": 2, "world": 2, "sp": 2, "dp": 1}},
        "run_status.json": {"exit_code": 75, "error": None, "first_step": 0, "start": "7.0", "host": "h", "rank": 0},
        "plan.json": {"peak_gib": 44.5},
        "ds_config.json": {"zero_optimization": {"stage": 3}},
        "data.json": {"total_steps": 3, "parts": {"train": part}, "sample": sample},
        ".requeue.json": {"job": "7", "crashes": 1, "step": 4, "idle": 0},
        HOLDER: {"host": "h", "pid": 7, "job": None, "since": "now"},
        "eval/needle-before.json": needle_result("base", 0.0),
        "eval/needle.json": needle_result("tuned", 95.5),
        "eval/perplexity.json": perplexity_result("tuned", 3.1),
        "eval/short.json": {
            "kind": "short", "model": "m", "date": "", "settings": {}, "length_tokens": 512, "loss": 1.0, "right_percent": 50.0,
            "samples": [{"question": "q", "answer": "a", "reply": "r", "right": True}],
        },
        "eval/longbench.json": {
            "kind": "longbench", "model": "m", "date": "", "settings": {"tasks": ["lcc"], "e": False, "limit": None},
            "scores": {"lcc": 1.0}, "averages": {"all": 1.0}, "by_length": {"lcc": {"0-4k": 1.0}},
        },
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.mark.parametrize("name", [MANIFEST, STATE])
def test_a_checkpoint_is_what_was_written_or_the_older_one_is_taken(run: Path, name: str) -> None:
    original = (run / "checkpoint-6" / name).read_bytes()

    @MANY
    @given(mutated(original))
    def check(content: bytes) -> None:
        def read(copy: Path) -> None:
            found, said = find(copy, "auto")
            assert found is not None
            if found.name == "checkpoint-4":
                assert "checkpoint-6 is damaged and passed over: " in said
            else:  # the mutation left the same content, or a key of the manifest that decides nothing
                assert read_file(found / STATE, TrainState) == state(6)

        with_file(run, f"checkpoint-6/{name}", content, read)

    check()


def test_a_newer_versions_state_is_passed_over_in_words(run: Path) -> None:
    def read(copy: Path) -> None:
        path = copy / "checkpoint-6"
        content = json.dumps(asdict(state(6)) | {"learned": 1}).encode()
        (path / STATE).write_bytes(content)
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"][STATE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / MANIFEST).write_text(json.dumps(manifest))
        found, said = find(copy, "auto")
        assert found == copy / "checkpoint-4"
        assert "state.json: holds learned, which this version does not know: written by a newer one" in said

    with_file(run, "metrics.jsonl", b"", read)


def test_no_record_is_lost_behind_a_bad_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines()

    @MANY
    @given(st.integers(0, len(lines) - 1).flatmap(lambda i: st.tuples(st.just(i), mutated(lines[i]))))
    def check(changed: tuple[int, bytes]) -> None:
        number, content = changed
        whole = b"\n".join([*lines[:number], content, *lines[number + 1 :]]) + b"\n"

        def read(copy: Path) -> None:
            Records(copy, LogConfig(), total_steps=9, first_step=99, active=True)
            kept = (copy / "metrics.jsonl").read_text().splitlines()
            others = [json.loads(line) for i, line in enumerate(lines) if i != number]
            assert [r for r in map(json.loads, kept) if r in others] == others
            if len(kept) < len(lines):
                assert (copy / "metrics-damaged.jsonl").read_bytes() == whole

        with_file(run, "metrics.jsonl", whole, read)

    check()


@pytest.mark.parametrize("name", [STATUS, ".requeue.json", HOLDER])
def test_who_starts_it_again_reads_garbage_too(run: Path, name: str) -> None:
    original = (run / name).read_bytes()

    @MANY
    @given(mutated(original))
    def check(content: bytes) -> None:
        def read(copy: Path) -> None:
            again, why = decide(copy, 75, 2, "7.0")
            assert isinstance(again, bool)
            assert why
            assert _holder(copy)
            crashed_before(copy)

        with_file(run, name, content, read)

    check()


PAGES = [
    "run_status.json", "versions.json", "data.json", "plan.json", "ds_config.json", "eval/needle.json",
    "eval/perplexity.json", "eval/short.json", "eval/longbench.json", "metrics.jsonl",
]  # fmt: skip


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("name", PAGES)
def test_the_page_of_a_run_is_made_of_what_is_readable(run: Path, name: str) -> None:
    original = (run / name).read_bytes()
    content = st.binary(max_size=200) | st.sampled_from(WHOLE) if name == "metrics.jsonl" else mutated(original)

    @MANY
    @given(content)
    def check(content: bytes) -> None:
        def read(copy: Path) -> None:
            facts = gather_facts(copy)
            html_page(facts)
            markdown_page(facts)

        with_file(run, name, content, read)

    check()


def test_a_tally_is_what_was_written_or_unreadable(tmp_path: Path) -> None:
    (tmp_path / "rows-00000.arrow").write_bytes(b"rows")
    seal = PartSeal.of(tmp_path / "rows-00000.arrow", 3)
    tally = Tally(read=4, usable=3, bad={"broken JSON": 1}, first={"broken JSON": "a:1"})
    SealedSet(tally, [seal]).write(tmp_path / "tally.json")
    original = (tmp_path / "tally.json").read_bytes()

    @MANY
    @given(mutated(original))
    def check(content: bytes) -> None:
        (tmp_path / "tally.json").write_bytes(content)
        with contextlib.suppress(Unreadable):
            found = sealed_set(tmp_path, every_byte=True)
            assert (found.parts, found.tally.usable) == ([seal], 3)

    check()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run_status.json"
    for content, says in (
        (b'{"exit_code": "75"}', "run_status.json: exit_code: Input should be a valid integer, seen 75"),
        (b"\0\0", "run_status.json: Invalid JSON"),
        (b"[]", "run_status.json: Input should be an object"),
    ):
        path.write_bytes(content)
        with pytest.raises(Unreadable, match=says):
            read_file(path, StatusFile)
    path.unlink()
    with pytest.raises(Unreadable, match=r"run_status.json cannot be read \(No such file or directory\)"):
        read_file(path, StatusFile)


def test_an_evaluation_goes_on_over_garbage(tmp_path: Path) -> None:
    """A row that cannot be read is made again, the others are kept; without readable settings all are made again."""

    def keys_after(content: bytes) -> list[str]:
        (tmp_path / "needle.rows.jsonl").write_bytes(content)
        rows = Rows(tmp_path, "needle", {"seed": 1}, total=9, show=False)
        rows.close()
        return [row["key"] for row in rows.rows]

    header, a, b = b'{"settings": {"seed": 1}}', b'{"key": "a", "reply": "x\xe2\x80\xa8y"}', b'{"key": "b"}'
    for bad in (b"\0\0", b"", b"null", b"5", b"\xff", b'{"key": 5}', b'{"reply": "x"}'):
        assert keys_after(b"\n".join([header, a, bad, b]) + b"\n") == ["a", "b"]
        assert keys_after(b"\n".join([bad, a, b]) + b"\n") == []
    assert keys_after(b"\n".join([header, a, b'{"key": "b", "re'])) == ["a"]
