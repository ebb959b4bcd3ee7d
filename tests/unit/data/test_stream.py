"""A stream's windows are the set, in its order, on every rank and after every restart."""

from __future__ import annotations

import gzip
import json
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.read import load_run_config
from ds_longft.config.run_config import DataConfig
from ds_longft.data import blocks, readers, stream
from ds_longft.data.stream import Stream, StreamLoader
from ds_longft.data.tokenize import Input, tokenize_sources
from ds_longft.errors import ConfigError, DataError
from tests.unit.data.test_loader import same

ROWS = 300


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Blocks of 1,000 bytes and windows of a few of them instead of 1 MiB."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(readers, "PARQUET_ROWS", 7)
    monkeypatch.setattr(stream, "MIB", 1000)


@pytest.fixture(params=["lines", "many kinds", "remote"])
def sources(request, tmp_path):
    texts = [f"row {i} " + "word " * (i % 17) for i in range(ROWS)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    if request.param == "lines":
        (tmp_path / "a.jsonl").write_text("".join(lines))
        return [SourceConfig(path=str(tmp_path / "a.jsonl"))]
    folder = tmp_path / "folder"
    folder.mkdir()
    if request.param == "remote":
        (folder / "a.jsonl").write_text("".join(lines[:120]))
        (folder / "b.jsonl").write_text("".join(lines[120:]))
        return [SourceConfig(path=f"file://{folder}/*.jsonl")]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(lines[:90]).encode()))
    pq.write_table(pa.table({"text": texts[90:200]}), folder / "b.parquet")
    (folder / "c.txt").write_text(texts[200])
    (tmp_path / "d.jsonl").write_text("".join(lines[201:]))
    return [SourceConfig(path=str(folder)), SourceConfig(path=str(tmp_path / "d.jsonl"))]


@pytest.fixture
def data(sources, tmp_path):
    return DataConfig(
        train=sources, cache_dir=str(tmp_path / "cache"), workers=1, max_length_tokens=128, stream_window_mib=4
    )


def opened(data, tokenizer, **changed):
    data = data.model_copy(update=changed)
    return Stream(Input.of(data.train, tokenizer, data, streaming=True), data, vocab=len(tokenizer))


def ids(rows):
    return [rows.row(i).input_ids.tolist() for i in range(len(rows))]


def windows_of_a_pass(windows):
    """The windows up to the first that begins as window 0 does."""
    found = [windows.window(0)]
    while (following := windows.window(len(found))).content != found[0].content:
        found.append(following)
    return found


def test_the_windows_are_the_set_in_its_order_and_then_the_set_again(data, tokenizer):
    whole = tokenize_sources(data.train, tokenizer, data)
    found = windows_of_a_pass(opened(data, tokenizer))
    assert len(found) > 3
    assert [row for window in found for row in ids(window)] == ids(whole)
    assert len(whole) == ROWS
    again = opened(data, tokenizer).window(len(found) + 1)
    assert again.content == found[1].content


@pytest.mark.parametrize("notes", ["kept", "lost"])
def test_a_later_process_has_the_same_windows(data, tokenizer, tmp_path, notes, monkeypatch):
    found = windows_of_a_pass(first := opened(data, tokenizer))
    number = len(found) - 2
    first.forget(len(found) + 2)
    assert not list(first.folder.glob("window-*"))
    if notes == "lost":
        (first.folder / "begins.json").unlink()
    read = []
    whole_task = stream.Task
    monkeypatch.setattr(stream, "Task", lambda *given: read.append(whole_task(*given)) or read[-1])
    later = opened(data, tokenizer)
    assert later.window(number).content == found[number].content
    size_bytes = sum(stream._size_bytes(task.block) for task in read)
    assert size_bytes < 5200 if notes == "kept" else size_bytes > 4000 * number
    assert later.content == first.content


def test_another_place_is_the_same_set_and_a_longer_file_another(tokenizer, tmp_path):
    def of(path):
        config = DataConfig(train=[SourceConfig(path=str(path))], cache_dir=str(tmp_path / "c"), stream_window_mib=4)
        return opened(config, tokenizer)

    a, b = tmp_path / "a.jsonl", tmp_path / "copy" / "a.jsonl"
    b.parent.mkdir()
    a.write_text('{"text": "one"}\n')
    b.write_text('{"text": "one"}\n')
    moved = of(b)
    assert moved.content == of(a).content
    assert moved.folder != of(a).folder
    b.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert of(b).content != moved.content


def loader(data, tokenizer, first=0, dp=1, dp_rank=0, sp=1, accumulation=4, ahead=False):
    return StreamLoader(
        opened(data, tokenizer), first=first, longest_tokens=128, makes_windows=ahead, data=data, dp=dp,
        dp_rank=dp_rank, sp=sp, accumulation=accumulation, seed=3,
    )  # fmt: skip


def trained(made, windows, start=(0, 0)):
    """(window, step) -> Step."""
    found = {}
    for number in range(start[0], windows):
        found |= {(number, s.index): s for s in made.steps(number, start[1] if number == start[0] else 0)}
    return found


def test_steps_do_not_depend_on_ranks_and_go_on_anywhere(data, tokenizer):
    whole = trained(loader(data, tokenizer), 3)
    assert len({window for window, _ in whole}) == 3
    ranks = [trained(loader(data, tokenizer, dp=2, dp_rank=r, sp=2, accumulation=2, ahead=r == 0), 3) for r in (0, 1)]
    for at, step in whole.items():
        of_ranks = [ranks[r][at] for r in (0, 1)]
        assert {s.total_weight for s in of_ranks} == {step.total_weight}
        assert {s.tokens for s in of_ranks} == {step.tokens}
        packs = [set(pack.rows) for s in of_ranks for pack in s.packs if pack.rows]
        assert sorted(map(sorted, packs)) == sorted(sorted(pack.rows) for pack in step.packs if pack.rows)
    at = sorted(whole)[len(whole) // 2]
    later = trained(loader(data, tokenizer, first=at[0]), 3, at)
    assert later.keys() == {key for key in whole if key >= at}
    for key, step in later.items():
        assert all(same(a, b) for a, b in zip(step.packs, whole[key].packs, strict=True))
        assert replace(step, packs=()) == replace(whole[key], packs=())
    names = {made.fingerprint for made in (loader(data, tokenizer), loader(data, tokenizer, first=2))}
    names |= {loader(data, tokenizer, dp=2, dp_rank=1, sp=2, accumulation=2).fingerprint}
    assert len(names) == 1
    made = loader(data, tokenizer)
    assert made.rows_name(0) != made.rows_name(1)


def test_only_what_is_trained_lies_on_disk(data, tokenizer):
    made = loader(data, tokenizer, ahead=True)
    for number in range(4):
        for _ in made.steps(number):
            pass
        for thread in threading.enumerate():
            if thread.name.startswith("ds_longft-window"):
                thread.join()
    kept = sorted(folder.name for folder in made._stream.folder.glob("window-*"))
    assert kept == ["window-000002", "window-000003", "window-000004"]  # the one before: another machine may read it
    assert made.fullest_pack(0).tokens == 128
    assert int((made.fullest_pack(0).labels >= 0).sum()) == 127


def test_two_processes_make_a_window_once(data, tokenizer, monkeypatch):
    made = []
    write = stream.write_set
    monkeypatch.setattr(stream, "write_set", lambda folder, *a, **k: made.append(folder) or write(folder, *a, **k))
    streams, found = [opened(data, tokenizer) for _ in range(3)], []
    threads = [threading.Thread(target=lambda s=s: found.append(s.window(0).content)) for s in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(made) == 1
    assert len(found) == 3


def test_a_later_window_whose_rows_cannot_be_used_ends_no_run(tokenizer, tmp_path):
    good, bad = json.dumps({"text": "good " * 30}) + "\n", json.dumps({"text": 7, "much": "x" * 140}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * 60 + bad * 60)
    data = DataConfig(
        train=[SourceConfig(path=str(tmp_path / "a.jsonl"))], cache_dir=str(tmp_path / "c"), workers=1,
        stream_window_mib=4,
    )  # fmt: skip
    windows = opened(data, tokenizer)
    assert len(windows.window(0)) > 20
    with pytest.warns(UserWarning, match="window [1-3] of the stream: none of the"):
        later = [windows.window(number) for number in range(1, 4)]
    empty = [number for number, window in enumerate(later, 1) if not len(window)]
    assert empty
    made = loader(data, tokenizer)
    with pytest.warns(UserWarning, match="of the stream"):
        assert [len(list(made.steps(number))) > 0 for number in range(4)] == [n not in empty for n in range(4)]
    (tmp_path / "a.jsonl").write_text(bad * 120)
    with pytest.raises(DataError, match="none of the"):
        opened(data, tokenizer).window(0)


def test_what_needs_the_whole_set_is_refused_by_name(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\nobjective: dpo\ntrain: {epochs: 2}\n"
        "data: {train: [{path: a.jsonl, limit: 3}], eval_fraction: 0.1, stream_window_mib: 64}\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_run_config(["--config", str(path)])
    for name in ("train.max_steps is missing", "train.epochs", "data.eval_fraction", "objective is dpo", "limit"):
        assert name in str(refused.value)
    path.write_text(
        "model: {path: m}\ntrain: {max_steps: 5}\ndata: {train: [a.jsonl], eval: [b.jsonl], stream_window_mib: 64}\n"
    )
    assert load_run_config(["--config", str(path)]).data.stream_window_mib == 64
    with pytest.raises(ConfigError, match=r"data\.stream_window_mib"):
        load_run_config(["--config", str(path), "--data.streaming", "true"])


def test_a_column_read_by_the_loader_is_that_of_the_window(data, tokenizer):
    made = loader(data, tokenizer)
    for number in (1, 0, 2):
        assert made.rows(number).content == opened(data, tokenizer).window(number).content
        assert np.sum(made.plan(number).pack_tokens) == made.rows(number).lengths.sum()
