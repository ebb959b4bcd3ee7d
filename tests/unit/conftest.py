"""The tiny tokenizer and a writer of JSONL files."""

import json

import pytest

from tests.tokenizer import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, (str, bytes)) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
        return str(path)

    return write


def chat(*contents, system=None):
    """Messages with alternating user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system is not None else []
    return {"messages": messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}
