"""An OpenAI-compatible server in place of a GPU: the same prompts, the same rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_longft.cli import main
from ds_longft.tools.evaluate.cached_attention import CACHED, register
from ds_longft.tools.evaluate.generate import end_ids, generate
from ds_longft.tools.evaluate.subject import find_subject, load_subject, subject_tokenizer
from tests.unit.tools.evaluate.test_needle import tiny_model

Asked = list[dict[str, Any]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def server(model: Path) -> Iterator[tuple[str, Asked]]:
    """Answers of the model, last prompt first; and what it was asked."""
    register()
    subject = find_subject(str(model))
    tokenizer, loaded = subject_tokenizer(subject), load_subject(subject, torch.device("cpu"), attention=CACHED)
    asked: Asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            stops = end_ids(loaded, tokenizer) | set(body.get("stop_token_ids", ()))
            made = generate(loaded, body["prompt"], max_new_tokens=body["max_tokens"], stop_ids=stops)
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made]
            self.reply({"choices": [{"index": i, "text": text} for i, text in enumerate(texts)][::-1]})

        def reply(self, content: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1/", asked
    httpd.shutdown()
    httpd.server_close()


def test_the_same_rows_as_of_a_gpu_here(model: Path, server: tuple[str, Asked], tmp_path: Path) -> None:
    address, asked = server
    argv = ["eval", "needle", str(model), "--lengths", "600", "--depths", "0,100", "--trials", "2", "--json"]
    found = []
    for name, flags in (("here", []), ("there", ["--server", address])):
        assert main([*argv, "--out", str(tmp_path / name), *flags]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "needle.rows.jsonl").read_text().splitlines()[1:]]
        found.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    assert found[0] == found[1]
    assert any(row["reply"] for row in found[0])
    assert [(len(one["prompt"]), one["model"], one["temperature"]) for one in asked] == [(4, "tiny", 0)]


def test_mistakes_are_refused(
    model: Path, server: tuple[str, Asked], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needle = ["eval", "needle", str(model), "--lengths", "600", "--out", str(tmp_path / "eval"), "--server"]
    for argv, said in (
        ([*needle, "http://127.0.0.1:1/v1"], "expected an OpenAI-compatible address"),
        ([*needle, server[0].replace("/v1/", "/other")], "serves no model"),
        ([*needle, server[0], "--sp", "2"], "--server answers by itself"),
        (["eval", "perplexity", str(model), "--server", server[0]], "not the loss of texts"),
    ):
        assert main(argv) == 64
        assert said in capsys.readouterr().err
