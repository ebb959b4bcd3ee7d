import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_longft.config import SourceConfig
from ds_longft.data.readers import read_rows
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError

ROWS = [{"text": f"row {i}", "n": i} for i in range(200)]


def read(path, **kwargs):
    return list(read_rows(SourceConfig(path=str(path), **kwargs)))


@pytest.fixture
def files(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json", "a.jsonl.gz", "a.parquet", "a.parquet.gz"])
@pytest.mark.parametrize("limit", [None, 65, 128])
def test_every_file_kind_gives_the_same_rows(files, name, limit):
    rows = read(files / name, limit=limit)
    assert [row for _, row in rows] == ROWS[:limit]
    assert rows[2][0] == f"{files / name}:3"


def test_a_folder_is_read_in_order_of_its_names(files):
    (files / "notes.md").write_text("not data")
    (files / ".hidden.jsonl").write_text("{")
    assert len(read(files)) == 6 * len(ROWS)
    assert read(files)[0][0] == f"{files / 'a.json'}:1"


def test_broken_records_keep_their_line_number_and_do_not_stop_reading(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\n\n{"text": \n"just a string"\n'
        b'{"text": "\xff"}\n{"a": 1, "a": 2}\n{"text": "last"}'
    )
    rows = read(path)
    assert [(origin.rpartition(":")[2], row.reason if isinstance(row, BadRow) else row) for origin, row in rows] == [
        ("1", {"text": "one"}),
        ("3", "broken JSON"),
        ("4", "not an object"),
        ("5", "not UTF-8"),
        ("6", "a key twice in one object"),
        ("7", {"text": "last"}),
    ]


def test_limit_does_not_count_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n\n{"n": 2}\n{"n": 3}\n')
    assert [row for _, row in read(tmp_path / "a.jsonl", limit=2)] == [{"n": 1}, {"n": 2}]


def test_a_file_that_is_cut_off_is_an_error_not_a_shorter_set(files):
    whole = (files / "a.jsonl.gz").read_bytes()
    (files / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        read(files / "a.jsonl.gz")
    (files / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read(files / "a.parquet")


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/folder"])
def test_a_missing_local_path_is_not_looked_up_on_the_hub(path):
    with pytest.raises(DataError, match="no such file or folder"):
        read(path)


def test_empty_folder_and_unknown_ending(tmp_path):
    (tmp_path / "README.txt").write_text("text\n")
    with pytest.raises(DataError, match="holds no data"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "b.jsonl").write_text('{"text": "t"}\n')
    for path in (tmp_path, f"{tmp_path}/*"):  # part of it alone would be trained otherwise
        with pytest.raises(DataError, match=r"cannot be read: a\.csv"):
            read(path)
    with pytest.raises(DataError, match="unknown ending"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.csv").rename(tmp_path / "A.CSV.gz")
    with pytest.raises(DataError, match=r"cannot be read: A\.CSV\.gz"):
        read(tmp_path)


def test_a_pattern_takes_its_files_in_order(tmp_path):
    for name, number in (("b_2.jsonl", 2), ("b_1.jsonl", 1), ("b_3.txt", 3), ("c.jsonl", 4), ("b_[0].jsonl", 0)):
        (tmp_path / name).write_text(json.dumps({"text": str(number)}) + "\n")
    assert [row["text"] for _, row in read(tmp_path / "b_*")] == ["1", "2", "0"]
    assert [row["text"] for _, row in read(tmp_path / "b_[0].jsonl")] == ["0"], "a file of that very name"
    with pytest.raises(DataError, match=r"no file fits .*x_\*"):
        read(tmp_path / "x_*")
