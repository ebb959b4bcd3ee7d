"""What samples are made of: documents, and dialogues about a reference, read from any set that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_longft.config.data_keys import SourceConfig
from ds_longft.data.formats import grounded, language_of, to_row
from ds_longft.data.ledger import Ledger
from ds_longft.data.readers import find_source
from ds_longft.data.rows import Turn
from ds_longft.errors import DataError
from ds_longft.tools.make_data.convert import layout_of, made_of_rows
from ds_longft.tools.make_data.language import detect_language
from ds_longft.tools.make_data.where import EVERY_ROW, Where


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str
    language: str
    id: str


@dataclass(frozen=True)
class Dialogue:
    """A dialogue about a reference text, which is not yet part of it."""

    text: str
    """The reference."""
    turns: tuple[Turn, ...]
    language: str
    id: str


def read_documents(config: SourceConfig, ledger: Ledger, where: Where = EVERY_ROW) -> list[Document]:
    """The documents of a set: plain texts, or the references of dialogues. Unusable rows go to the ledger.

    Raises:
        DataError: the set holds neither, or no row that `where` takes.
    """
    source = find_source(config)
    layout = layout_of(source)
    if layout not in ("text", "grounded"):
        raise DataError(f"{config.path} holds {layout} rows, expected plain text (column text) or dialogues about one")

    def document(record: dict[str, Any], origin: str) -> Document:
        if layout == "text":
            text = to_row(record, "text", source=config.path, origin=origin).turns[0].content
        else:
            text, _ = grounded(record)
        return Document(text, _language(record, [Turn("text", text)]), _id(record, origin))

    return list(made_of_rows(source, document, ledger, where, name=config.path, progress=False))


def read_dialogues(config: SourceConfig, ledger: Ledger, where: Where = EVERY_ROW) -> list[Dialogue]:
    """The dialogues of a set that come with a reference. Unusable rows go to the ledger.

    Raises:
        DataError: the set has no references, or no row that `where` takes.
    """
    source = find_source(config)
    if layout_of(source) != "grounded":
        raise DataError(
            f"{config.path} has no references: expected columns reference and dialogue (RefGPT), reference and "
            "messages, context and qas, or document, question and answer"
        )

    def dialogue(record: dict[str, Any], origin: str) -> Dialogue:
        row = to_row(record, "grounded", source=config.path, origin=origin)  # all that holds for a row is checked there
        reference, turns = grounded(record)
        kept = tuple(turns[: len(row.turns)])
        return Dialogue(reference.strip(), kept, _language(record, kept), _id(record, origin))

    return list(made_of_rows(source, dialogue, ledger, where, name=config.path, progress=False))


def _language(record: dict[str, Any], turns: Sequence[Turn]) -> str:
    return language_of(record) or detect_language(turns)


def _id(record: dict[str, Any], origin: str) -> str:
    given = record.get("id")
    return str(given) if isinstance(given, str | int) and given != "" else origin.rpartition("/")[2]
