"""The cache of tokenized sets after something happened to it: seen on opening, said, and made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.run_config import DataConfig
from ds_longft.data import encode_blocks
from ds_longft.data import tokenize as module
from ds_longft.data.tokenize import tokenize_sources
from ds_longft.errors import DataError
from tests.unit.conftest import chat

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(30)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose sets have several parts."""
    monkeypatch.setattr(module, "PART_BLOCKS", 1)
    monkeypatch.setattr("ds_longft.data.blocks.BLOCK_BYTES", 800)
    return tmp_path / "cache"


@pytest.fixture
def tokenize(cache: Path, tokenizer):
    def tokenize(path, **more):
        data = DataConfig(cache_dir=str(cache), max_length_tokens=4096, workers=1)
        return tokenize_sources([SourceConfig(path=str(path))], tokenizer, data, **more)

    return tokenize


def flip_a_bit(folder: Path) -> None:
    path = folder / "rows-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES = {
    "a part is purged": (lambda folder: (folder / "rows-00000.arrow").unlink(), "rows-00000.arrow cannot be read"),
    "all parts are purged": (lambda folder: [p.unlink() for p in folder.glob("rows-*")], "rows-00000.arrow"),
    "a part is cut": (lambda folder: os.truncate(folder / "rows-00001.arrow", 100), "has 100 bytes instead of"),
    "the tally is cut": (lambda folder: os.truncate(folder / "tally.json", 30), "tally.json: Invalid JSON"),
    "the tally is gone": (lambda folder: (folder / "tally.json").unlink(), "tally.json cannot be read"),
    "the tally is NULs": (write("tally.json", b"\0" * 200), "tally.json: Invalid JSON"),
    "the tally is null": (write("tally.json", b"null"), "tally.json: Input should be"),
    "the tally counts others": (
        lambda folder: (folder / "tally.json").write_text(
            (folder / "tally.json").read_text().replace('"usable": 30', '"usable": 31')
        ),
        "counts 31 rows, its parts have 30",
    ),
    "the folder is empty": (lambda folder: [p.unlink() for p in folder.iterdir()], "tally.json cannot be read"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_seen_said_and_made_again(what, cache, tokenize, write_jsonl, capsys) -> None:
    path = write_jsonl(ROWS)
    content = tokenize(path).content  # not kept open: reading a cut file through its memory map ends the process
    (folder,) = [p for p in cache.iterdir() if p.is_dir()]
    assert len(list(folder.glob("rows-*.arrow"))) > 2
    damage, says = DAMAGES[what]
    damage(folder)
    again = tokenize(path)
    said = capsys.readouterr().err
    assert f"the tokenized set {folder} is damaged, and is made again" in said
    assert says in said
    assert (len(again), again.content) == (30, content)
    tokenize(path)
    assert capsys.readouterr().err == "", "and then it is whole"


def test_a_flipped_bit_is_seen_where_every_byte_is_looked_at(cache, tokenize, write_jsonl, capsys) -> None:
    path = write_jsonl(ROWS)
    content = tokenize(path).content
    (folder,) = [p for p in cache.iterdir() if p.is_dir()]
    flip_a_bit(folder)
    tokenize(path)
    assert capsys.readouterr().err == "", "sizes alone do not show it"
    assert tokenize(path, every_byte=True).content == content
    assert "rows-00001.arrow is not what was written (sha256)" in capsys.readouterr().err


def test_a_part_that_a_power_cut_took_is_done_again(cache, tokenize, write_jsonl, monkeypatch, tmp_path) -> None:
    """A killed call leaves parts with their seals; one of them is not what its seal says any more."""
    path = write_jsonl(ROWS)
    expected = tokenize(path).content
    shutil.rmtree(cache)
    encode, calls = encode_blocks.encode_block, []

    def killed(task, encoder):
        calls.append(task.block.first)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(task, encoder)

    monkeypatch.setattr(encode_blocks, "encode_block", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenize(path)
    (partial,) = cache.glob(".*.partial")
    os.truncate(partial / "rows-00001.arrow", 10)
    assert tokenize(path).content == expected
    assert calls[4:6] == [calls[1], calls[2]], "the damaged part, and the one under way"


def test_rows_are_known_by_what_is_trained_of_them(tokenize, write_jsonl, tmp_path) -> None:
    path = write_jsonl(ROWS)
    content = tokenize(path).content
    moved = tmp_path / "elsewhere" / "other.jsonl"
    moved.parent.mkdir()
    shutil.copyfile(path, moved)
    touched = write_jsonl(ROWS, "touched.jsonl")
    os.utime(touched, (1, 1))
    halves = tmp_path / "halves"
    halves.mkdir()
    lines = Path(path).read_bytes().splitlines(keepends=True)
    for name, part in (("a.jsonl", lines[:11]), ("b.jsonl", lines[11:])):
        (halves / name).write_bytes(b"".join(part))
    for same in (moved, touched, tmp_path / "." / "rows.jsonl", halves):
        assert tokenize(same).content == content, same
    reordered, weighted = [ROWS[1], ROWS[0], *ROWS[2:]], [{**ROWS[0], "weight": 0.5}, *ROWS[1:]]
    edited = [chat("question 0", "answer X"), *ROWS[1:]]
    untrained = [{"messages": [*ROWS[0]["messages"], *ROWS[1]["messages"]]}, *ROWS[2:]]
    others = [
        tokenize(write_jsonl(rows, f"{i}.jsonl")).content
        for i, rows in enumerate((reordered, weighted, edited, untrained, ROWS[1:]))
    ]
    assert len({content, *others}) == 6
    train, held_out = tokenize(path).split(0.2, seed=1)
    of_moved = tokenize(moved).split(0.2, seed=1)
    assert (train.content, held_out.content) == (of_moved[0].content, of_moved[1].content)
    assert tokenize(path).part(np.arange(5), "x").content == tokenize(moved).part(np.arange(5), "x").content


def test_an_answer_edited_with_size_and_time_kept_is_tokenized_anew(tokenize, write_jsonl) -> None:
    """`touch -r`, `rsync -t` of another version."""
    path = Path(write_jsonl(ROWS))
    content, kept = tokenize(path).content, path.stat()
    path.write_text(path.read_text().replace("answer 7", "answer 8"))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert path.stat().st_size == kept.st_size
    assert tokenize(path).content != content


@pytest.mark.parametrize("place", ["/proc/nope", "{file}/cache"])
def test_a_cache_that_cannot_be_made_is_an_error_with_the_key(place, tokenizer, write_jsonl) -> None:
    path = write_jsonl(ROWS)
    data = DataConfig(cache_dir=place.replace("{file}", path), workers=1)
    with pytest.raises(DataError, match=r"data\.cache_dir .* cannot be made"):
        tokenize_sources([SourceConfig(path=path)], tokenizer, data)
