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

Asked = list[dict[str, Any]]


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[tuple[str, Asked]]:
    """Answers of the model, last prompt first; and what it was asked."""
    register()
    subject = find_subject(str(tiny_folder))
    tokenizer, loaded = subject_tokenizer(subject), load_subject(subject, torch.device("cpu"), attention=CACHED)
    asked: Asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            stops = end_ids(loaded, tokenizer) | set(body.get("stop_token_ids", ()))
            least = body.get("min_tokens", 0)
            made = generate(
                loaded, body["prompt"], max_new_tokens=body["max_tokens"], stop_ids=stops, min_new_tokens=least
            )
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


def longbench(folder: Path) -> list[str]:
    """A task whose answer ends with its line, after one token at least."""
    (folder / "dataset2prompt.json").write_text(json.dumps({"samsum": "{context}\n{input}"}))
    row = {"input": "who?", "context": "x = 1\n" * 300, "answers": ["x = 1"], "length": 100, "all_classes": None}
    (folder / "samsum.jsonl").write_text((json.dumps(row) + "\n") * 2)
    return ["--data", str(folder), "--tasks", "samsum", "--max_length", "200"]


@pytest.mark.parametrize(
    ("command", "flags", "prompts"),
    [
        ("needle", ["--lengths", "600", "--depths", "0,100", "--trials", "2"], [4]),
        ("ruler", ["--lengths", "2K", "--tasks", "vt,fwe", "--rows", "1"], [1, 1]),
        ("longbench run", [], [2]),
    ],
)
def test_the_same_rows_and_scores_as_of_a_gpu_here(
    command: str, flags: list[str], prompts: list[int], tiny_folder: Path, server: tuple[str, Asked], tmp_path: Path
) -> None:
    address, asked = server
    asked.clear()
    argv = ["eval", *command.split(), str(tiny_folder), *flags, "--json"]
    if command == "longbench run":
        argv += longbench(tmp_path)
    found = []
    kind = command.split(maxsplit=1)[0]
    for name, asking in (("here", []), ("there", ["--server", address])):
        assert main([*argv, "--out", str(tmp_path / name), *asking]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / f"{kind}.rows.jsonl").read_text().splitlines()[1:]]
        result = json.loads((tmp_path / name / f"{kind}.json").read_text())
        scores = {
            key: result[key] for key in result if key in ("exact_percent", "grid", "by_length", "averages", "scores")
        }
        assert scores
        found.append(([{key: value for key, value in row.items() if key != "seconds"} for row in rows], scores))
    assert found[0] == found[1]
    replies = [text for row in found[0][0] for text in (row.get("reply"), row.get("pred")) if text is not None]
    assert len(replies) == sum(prompts)
    assert any(replies)
    assert [(len(one["prompt"]), one["model"], one["temperature"]) for one in asked] == [
        (n, "tiny", 0) for n in prompts
    ]
    if command == "longbench run":
        assert all(one["stop_token_ids"] and one["min_tokens"] == 1 for one in asked)


def test_mistakes_are_refused(
    tiny_folder: Path, server: tuple[str, Asked], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needle = ["eval", "needle", str(tiny_folder), "--lengths", "600", "--out", str(tmp_path / "eval"), "--server"]
    for argv, said in (
        ([*needle, "http://127.0.0.1:1/v1"], "expected an OpenAI-compatible address"),
        ([*needle, server[0].replace("/v1/", "/other")], "serves no model"),
        ([*needle, server[0], "--sp", "2"], "--server answers by itself"),
        (["eval", "perplexity", str(tiny_folder), "--server", server[0]], "not the loss of texts"),
    ):
        assert main(argv) == 64
        assert said in capsys.readouterr().err
