import bz2
import gzip
import json
import tarfile

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.readers import find_source, read_rows
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
    (tmp_path / "a.xlsx").write_text("text\n")
    (tmp_path / "b.jsonl").write_text('{"text": "t"}\n')
    for path in (tmp_path, f"{tmp_path}/*"):  # part of it alone would be trained otherwise
        with pytest.raises(DataError, match=r"cannot be read: a\.xlsx"):
            read(path)
    with pytest.raises(DataError, match="unknown ending"):
        read(tmp_path / "a.xlsx")
    (tmp_path / "a.xlsx").rename(tmp_path / "A.XLSX.gz")
    with pytest.raises(DataError, match=r"cannot be read: A\.XLSX\.gz"):
        read(tmp_path)


def test_csv_has_a_row_a_line_and_texts_for_values(tmp_path):
    """Values keep their commas and line ends, long ones too; a number is a text, and nothing is no value."""
    long = "x" * 200_000
    (tmp_path / "a.csv").write_bytes(f'\ufeffquestion,answer,note\n"one, ""two""\nthree",4,\n5,{long},n\n'.encode())
    (tmp_path / "b.tsv").write_text("question\tanswer\na, b\tc\n")
    assert [row for _, row in read(tmp_path / "a.csv")] == [
        {"question": 'one, "two"\nthree', "answer": "4"},
        {"question": "5", "answer": long, "note": "n"},
    ]
    assert [row for _, row in read(tmp_path / "b.tsv")] == [{"question": "a, b", "answer": "c"}]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (b"a,b\n1,2,3\n", "more values than columns"),
        (b'a,b\n"1,2\n', "the rest of the file is no CSV"),
        (b"a,b\n\xff,2\n", "the rest of the file is no CSV"),
    ],
)
def test_csv_that_is_none_is_no_row(tmp_path, lines, reason):
    (tmp_path / "a.csv").write_bytes(lines)
    ((_, row),) = read(tmp_path / "a.csv")
    assert isinstance(row, BadRow)
    assert row.reason == reason


def test_columns_of_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"frage": "q", "antwort": "a", "id": 1}\n{"frage": "q", "prompt": "p"}\n')
    columns = {"frage": "prompt", "antwort": "completion"}
    (_, row), (_, bad) = read(tmp_path / "a.jsonl", columns=columns)
    assert row == {"prompt": "q", "completion": "a", "id": 1}
    assert isinstance(bad, BadRow), "one of its two prompts would be lost"
    (_, first) = read(tmp_path / "a.jsonl", columns=columns, limit=1)[0]
    assert first == row
    swapped = {"frage": "antwort", "antwort": "frage"}
    assert read(tmp_path / "a.jsonl", columns=swapped, limit=1)[0][1] == {"antwort": "q", "frage": "a", "id": 1}


def test_a_pattern_takes_its_files_in_order(tmp_path):
    for name, number in (("b_2.jsonl", 2), ("b_1.jsonl", 1), ("b_3.png", 3), ("c.jsonl", 4), ("b_[0].jsonl", 0)):
        (tmp_path / name).write_text(json.dumps({"text": str(number)}) + "\n")
    assert [row["text"] for _, row in read(tmp_path / "b_*")] == ["1", "2", "0"]
    assert [row["text"] for _, row in read(tmp_path / "b_[0].jsonl")] == ["0"], "a file of that very name"
    with pytest.raises(DataError, match=r"no file fits .*x_\*"):
        read(tmp_path / "x_*")


def clone(folder):
    """A hub set as `git clone` leaves it."""
    for name, rows in (("train", 3), ("test", 2)):
        file = folder / f"data/{name}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"text": f"{name} {i}"} for i in range(rows)]), file)
    (folder / "README.md").write_text("# A set")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".gitattributes").write_text("")
    return folder


def texts(path, **more):
    return [row["text"] for _, row in read(path, **more)]


def test_a_clone_of_a_hub_set_is_read_by_its_splits(tmp_path):
    folder = clone(tmp_path / "clone")
    assert texts(folder) == ["train 0", "train 1", "train 2"]
    assert texts(folder, split="test") == ["test 0", "test 1"]
    remark = find_source(SourceConfig(path=str(folder))).remark
    for name in (
        "data/test-00000-of-00001.parquet (split test)",
        "README.md",
        "dataset_infos.json",
        ".gitattributes (hidden)",
    ):
        assert name in remark
    with pytest.raises(
        DataError, match=r"no files of split 'validation', only of test, train: set data\.train\[\]\.split"
    ):
        read(folder, split="validation")


@pytest.mark.parametrize("keys", [{"split": "test"}, {"subset": "main"}, {"revision": "abc"}])
def test_keys_of_hub_sets_are_refused_where_they_would_do_nothing(tmp_path, keys):
    (tmp_path / "a.jsonl").write_text('{"text": "t"}\n')
    with pytest.raises(DataError, match=f"{next(iter(keys))}.*leave it out|no such folder"):
        read(tmp_path / "a.jsonl", **keys)
    with pytest.raises(DataError, match=r"leave it out|no such folder"):
        read(tmp_path, **keys)


def test_a_configuration_of_a_clone_is_a_subfolder(tmp_path):
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-00000-of-00001.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert texts(tmp_path, subset="socratic") == ["socratic"]
    with pytest.raises(DataError, match="it has main, socratic"):
        read(tmp_path, subset="extra")


def test_hidden_folders_are_left_out_and_said(tmp_path):
    for folder in (".", ".ipynb_checkpoints", "inner/.cache"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "train.jsonl").write_text(json.dumps({"text": folder}) + "\n")
    assert texts(tmp_path) == ["."]
    assert (
        ".ipynb_checkpoints/train.jsonl, inner/.cache/train.jsonl (hidden)"
        in find_source(SourceConfig(path=str(tmp_path))).remark
    )


def test_every_file_of_a_folder_is_read_or_named(tmp_path):
    row = json.dumps({"text": "jsonl"}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(row)
    (tmp_path / "b.jsonlines").write_bytes(row)
    (tmp_path / "c.txt").write_text("A whole\nbook.\n")
    (tmp_path / "c2.txt.gz").write_bytes(gzip.compress(b"Packed."))
    (tmp_path / "e.jsonl.bz2").write_bytes(bz2.compress(row))
    for codec, suffix in (("lz4", ".lz4"), ("zstd", ".zst")):
        with pa.CompressedOutputStream(str(tmp_path / f"f.jsonl{suffix}"), codec) as out:
            out.write(row)
    table = pa.Table.from_pylist([{"text": "table"}])
    pa.feather.write_feather(table, tmp_path / "g.feather")
    with pa.ipc.new_stream(tmp_path / "h.arrow", table.schema) as out:
        out.write_table(table)
    with tarfile.open(tmp_path / "i.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.jsonl", "inner/a.jsonl")
        archive.add(tmp_path / "c.txt", "inner/c.txt")
        archive.add(tmp_path / "g.feather", "inner/g.feather")
    (tmp_path / "j.jsonl.1").write_bytes(row)
    (tmp_path / "README.txt").write_text("About it.")
    expected = [
        "jsonl",
        "jsonl",
        "A whole\nbook.\n",
        "Packed.",
        "jsonl",
        "jsonl",
        "jsonl",
        "table",
        "table",
        "jsonl",
        "A whole\nbook.\n",
    ]
    assert texts(tmp_path) == expected
    remark = find_source(SourceConfig(path=str(tmp_path))).remark
    assert "README.txt, j.jsonl.1 (no data)" in remark
    assert "i.tar.gz: not read: inner/g.feather" in remark


def test_what_save_to_disk_leaves_is_read_by_its_splits(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    rows.save_to_disk(tmp_path / "set")
    assert texts(tmp_path / "set") == ["one", "two"]
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "sets")
    assert texts(tmp_path / "sets") == ["one", "two"]
    assert texts(tmp_path / "sets", split="test") == ["two"]


def test_keys_that_other_rows_of_a_table_have_are_not_there(tmp_path):
    calls = [{"arguments": {"city": "Ulm"}}, {"arguments": {"word": "sea"}}]
    pq.write_table(pa.Table.from_pylist([{"calls": [call]} for call in calls]), tmp_path / "a.parquet")
    assert [row for _, row in read(tmp_path / "a.parquet")] == [{"calls": [call]} for call in calls]


def test_configuration_split_and_revision_of_a_hub_set(monkeypatch):
    import datasets

    asked = []

    def load(path, name=None, split=None, revision=None):
        asked.append((path, name, split, revision))
        if name is None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"
            )
        return datasets.Dataset.from_list([{"text": "one"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["main", "socratic"])
    assert texts("openai/gsm8k", subset="main", split="test", revision="abc") == ["one"]
    assert asked == [("openai/gsm8k", "main", "test", "abc")]
    with pytest.raises(DataError, match=r"'main', 'socratic'.*data\.train\[\]\.subset"):
        read("openai/gsm8k", split="test")


def test_remote_files_are_read_through_datasets(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "far away"}\n')
    (tmp_path / "b.txt").write_text("A\nbook.")
    assert texts(f"file://{tmp_path}/a.jsonl") == ["far away"]
    assert texts(f"file://{tmp_path}/b.txt") == ["A\nbook."]
    with pytest.raises(DataError, match="unknown ending"):
        read("s3://bucket/folder")
