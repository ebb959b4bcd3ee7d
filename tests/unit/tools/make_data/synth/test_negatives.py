"""Parts of a document with near ones of others between them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from ds_longft.cli import main
from ds_longft.data.rows import Turn
from ds_longft.errors import DataError
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.negatives import negative_rows
from ds_longft.tools.make_data.synth.row_plan import Wanted
from ds_longft.tools.make_data.synth.sources import Document
from tests.unit.tools.make_data.texts import chinese, english

SEPARATOR = "\n=====\n"


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Even ones are about one thing, odd ones about another; and one that is too short for a row of its own."""
    made = []
    for seed in range(8):
        lines = english(60, seed).splitlines()
        thing = "quantum" if seed % 2 else "baroque"
        made.append(Document("\n".join(f"{line} {thing} {thing}" for line in lines), "en", f"en{seed}"))
    return [
        *made,
        Document("quantum " * 12, "en", "short"),
        *(Document(chinese(60, s), "zh", f"zh{s}") for s in range(3)),
    ]


def test_neighbours_stand_between_parts_in_their_order(documents: list[Document]) -> None:
    lengths, wanted = Lengths(), Wanted(6, 1600, 1, "n")
    rows = list(negative_rows(documents, wanted, part_tokens=200, separator=SEPARATOR))
    assert rows == list(negative_rows(documents, wanted, part_tokens=200, separator=SEPARATOR))
    assert len({row["id"] for row in rows}) == 6
    text_of = {f"n-1-{document.id}": document for document in documents}
    for row in rows:
        own, parts = text_of[row["id"]], row["text"].split(SEPARATOR)
        mine = [i for i, part in enumerate(parts) if part in own.text]
        assert len(mine) == row["parts"] == 4
        assert mine[0] == 0, "a part of the document comes first"
        assert all(b - a > 1 for a, b in pairwise(mine)), "and no two beside each other"
        places = [own.text.index(parts[i]) for i in mine]
        assert places == sorted(places)
        others = [part for i, part in enumerate(parts) if i not in mine]
        assert len(set(others)) == len(others)
        assert 1200 < lengths.rows([[Turn("text", row["text"])]])[0] <= 1600
        assert {d.language for d in documents for part in others if part in d.text} == {own.language}
        if own.language == "en":
            thing = "quantum" if "quantum" in own.text else "baroque"
            assert all(thing in part for part in others), "the nearest there are"


def test_what_cannot_be_made(documents: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="12 rows were asked for, and 11 documents"):
        next(negative_rows(documents, Wanted(12, 1600, 0, "n"), part_tokens=200))
    with pytest.raises(DataError, match="no part of another document"):
        next(negative_rows(documents[:1], Wanted(1, 1600, 0, "n"), part_tokens=200))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))
    argv = ["data", "synth", "negatives", str(tmp_path / "a.jsonl"), str(tmp_path / "out.jsonl"), "--rows", "3"]
    assert main([*argv, "--context_tokens", "1600", "--part_tokens", "200", "--separator", "\\n##\\n"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all("\n##\n" in row["text"] for row in rows)
    assert main([*argv, "--part_tokens", "16K"]) == 64
    assert "room for four parts" in capsys.readouterr().err
