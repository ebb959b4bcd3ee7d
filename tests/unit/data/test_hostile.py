"""Hostile files: they cost their own rows, named in the ledger, and no memory to speak of."""

import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data import records
from ds_longft.data.readers import read_rows
from ds_longft.data.records import Metered, array_elements
from ds_longft.data.rows import BadRow

GOOD = b'{"text": "a good row"}'
DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def converted_elsewhere(tmp_path, name, chunks):
    """(rows written, reasons in the ledger, peak MiB above an almost empty file) of `data convert` in its own process."""
    (tmp_path / "plain.jsonl").write_bytes(GOOD)
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) if name.endswith(".gz") else path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
    # VmHWM, not getrusage: a process inherits the ru_maxrss of the one it was started from.
    code = """
import re, sys
from pathlib import Path
from ds_longft.cli import main
for path in sys.argv[1:]:
    assert main(["data", "convert", path, "out.jsonl", "--max_bad_fraction", "1", "--json"]) == 0
    print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""
    words = [sys.executable, "-c", code, str(tmp_path / "plain.jsonl"), str(path)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before_mib, after_mib = (int(line) for line in done.stdout.splitlines()[1::2])
    out = (tmp_path / "out.jsonl").read_text().splitlines()
    ledger = [json.loads(line) for line in (tmp_path / "out.jsonl.ledger.jsonl").read_text().splitlines()]
    return len(out), [entry["reason"] for entry in ledger], after_mib - before_mib


def test_a_line_of_200_mb_in_a_packed_file(tmp_path):
    chunks = [GOOD + b"\n", b'{"text": "', *[b"x" * (1 << 20)] * 200, b'"}\n', GOOD + b"\n"]
    written, reasons, extra_mib = converted_elsewhere(tmp_path, "bomb.jsonl.gz", chunks)
    assert (written, reasons) == (2, ["record too large"])
    assert extra_mib < 160, "64 MiB of one record may be held, and a copy of it"


def test_everything_else_at_once(tmp_path):
    lines = [
        GOOD,
        b'{"text": "bad \xff\xfe UTF-8"}',
        DEEP,
        b'{"text": {"no": "string"}}',
        b'{"text": 3}',
        b'{"text": "\\ud800"}',
        b'{"text": null, "id": 1e999}',
        b'{"text": "one", "text": "two"}',
        b'[["text", "a list"]]',
        b'{"text": ' + b"9" * 5000 + b"}",
        b"\x00\x00\x00",
        b'{"text": "first of its id", "id": "a"}',
        b'{"text": "second of its id", "id": "a"}',
        b'{"text": "cut off',
    ]
    written, reasons, extra_mib = converted_elsewhere(tmp_path, "hostile.jsonl", [b"\n".join(lines)])
    assert written == 2
    assert reasons == [
        "not UTF-8",
        "broken JSON",
        "text is not a string",
        "text is not a string",
        "text is not valid Unicode",
        "text is null or missing",
        "a key twice in one object",
        "not an object",
        "broken JSON",
        "broken JSON",
        "an earlier row has the same id",
        "broken JSON",
    ]
    assert extra_mib < 60


def read(path):
    return [row.reason if isinstance(row, BadRow) else row for _, row in read_rows(SourceConfig(path=str(path)))]


def test_a_zip_bomb_ends_its_file_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "EXPANSION_JUDGED_BYTES", 1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD + b"\n" + b" " * (8 << 20) + b"\n" + GOOD))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    row = json.loads(GOOD)
    assert read(tmp_path) == [row, "the rest of the file is a zip bomb", row]


def test_an_array_costs_its_broken_elements_only(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(
        b"[" + b",\n".join([GOOD, b'{"text": nul}', b'{"text": "\xff"}', DEEP, b'"a string"', GOOD]) + b"]"
    )
    row = json.loads(GOOD)
    assert read(path) == [row, "broken JSON", "not UTF-8", "broken JSON", "not an object", row]
    path.write_bytes(b"[" + GOOD + b", " + GOOD[:10])
    assert read(path) == [row, "JSON array without its end"]
    path.write_bytes(b"[" + GOOD + b"] more")
    assert read(path) == [row, "text behind the end of the JSON array"]


def test_a_parquet_string_that_is_no_utf8(tmp_path):
    text = pa.array([b"good", b"\xff\xfe", b"also good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"text": "good"}, "not UTF-8", {"text": "also good"}]


def test_a_record_at_the_limit_is_kept_and_one_above_it_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    rows = [json.dumps({"text": "x" * size}).encode() for size in (80, 200, 85)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "a.json").write_bytes(b"[" + b",".join(rows) + b"]")
    for name in ("a.jsonl", "a.json"):
        assert read(tmp_path / name) == [json.loads(rows[0]), "record too large", json.loads(rows[2])]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


class Slow:
    """A stream that gives a few bytes at a time, so that every border falls somewhere else."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def read(self, _):
        head, self.data = self.data[: self.size], self.data[self.size :]
        return head


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(JSON, max_size=5), size=st.integers(1, 30), indent=st.sampled_from([None, 1]), ascii=st.booleans()
)
def test_elements_are_those_of_the_array_wherever_reading_stops(values, size, indent, ascii):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    elements = list(array_elements(Metered(Slow(text, size), None)))
    assert [json.loads(e.decode("utf-8", "surrogatepass")) for e in elements] == values


@pytest.mark.parametrize("data", [b"[", b"[[[[", b'["', b"[1,,2]", b"[}", b"[]", b'[{"a": "\\'])
def test_no_bytes_whatever_crash_the_cutter(data):
    assert all(isinstance(e, bytes | BadRow) for e in array_elements(Metered(Slow(data, 2), None)))
