"""Files that fsspec fetches: an HTTP server and a file system in memory give the rows of the local files."""

from __future__ import annotations

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.readers import read_rows
from ds_longft.errors import DataError

ROWS = [{"messages": [{"role": "user", "content": f"Q{i}?"}, {"role": "assistant", "content": "A."}]} for i in range(5)]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Folder with the rows as lines, as parquet and in two parts."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", tmp_path / "cache/downloads")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", False)
    folder = tmp_path / "files"
    folder.mkdir()
    for name, part in (("rows", ROWS), ("part-0", ROWS[:3]), ("part-1", ROWS[3:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder


def rows_of(path):
    return [record for _, record in read_rows(SourceConfig(path=path))]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_over_http(files, name):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(files)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert rows_of(f"{address}/{name}") == ROWS
        with pytest.raises(DataError, match="cannot be read"):
            rows_of(f"{address}/none.jsonl")
    finally:
        server.shutdown()


def test_a_pattern_on_another_file_system(files):
    memory = fsspec.filesystem("memory")
    for file in files.glob("part-*.jsonl"):
        memory.pipe_file(f"/set/{file.name}", file.read_bytes())
    try:
        assert rows_of("memory://set/part-*.jsonl") == ROWS
    finally:
        memory.rm("/set", recursive=True)
