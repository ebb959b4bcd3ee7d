"""Token ids of a text in which no token reaches over certain borders.

Where a token would hold the last character of the prompt and the first of the answer, the answer would not be what the
model is asked to write: when it is served, the prompt is tokenised alone. Nearly every text has its borders between
tokens anyway and keeps the ids of the whole; the others are cut there and their pieces encoded one by one. Tokens with
the flags `lstrip` or `rstrip`, which swallow the blanks around them, are kept from the answer's blanks so too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer

BLANKS = ("\u2581", "\u0120")  # how tokens write a blank: SentencePiece, byte-level BPE


@dataclass(frozen=True)
class Piece:
    """A part of a text, encoded."""

    start: int  # its first character in the text
    encoding: Encoding
    guard_chars: int  # characters in front of it that were encoded with it, and the tokens of those
    guard_tokens: int

    @property
    def ids(self) -> list[int]:
        """Token ids without those of the guard."""
        return self.encoding.ids[self.guard_tokens :]


@dataclass(frozen=True)
class Pieces:
    """A text as pieces, one behind the other."""

    pieces: list[Piece]

    @property
    def ids(self) -> list[int]:
        """Token ids of the whole text."""
        return self.pieces[0].ids if len(self.pieces) == 1 else [i for piece in self.pieces for i in piece.ids]

    def tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """The run of tokens that hold any of the characters [start, end) of the text."""
        at, run = 0, []
        following = [piece.start for piece in self.pieces[1:]]
        for piece, stop in zip(self.pieces, [*following, end], strict=True):
            count = len(piece.encoding) - piece.guard_tokens
            if start < stop and end > piece.start:
                shift = piece.guard_chars - piece.start
                first, last = tokens_of(piece.encoding, max(start, piece.start) + shift, end + shift)
                run += [at + first - piece.guard_tokens, at + min(last - piece.guard_tokens, count)]
            at += count
        return (run[0], run[-1]) if run else (at, at)


def encode_pieces(tokenizer: Tokenizer, text: str, whole: Encoding, borders: Sequence[int]) -> Pieces:
    """`text`, whose encoding is `whole`, with no token over any of the `borders` (characters)."""
    crossed = sorted({at for at in borders if 0 < at < len(text) and _is_crossed(whole, at)})
    if not crossed:
        return Pieces([Piece(0, whole, 0, 0)])
    starts, ends = [0, *crossed], [*crossed, len(text)]
    parts = [text[a:b] for a, b in zip(starts, ends, strict=True)]
    first = Piece(0, tokenizer.encode(parts[0], add_special_tokens=False), 0, 0)
    return Pieces([first, *(_inside(tokenizer, part, at) for part, at in zip(parts[1:], crossed, strict=True))])


def _inside(tokenizer: Tokenizer, part: str, start: int) -> Piece:
    """A part of a text as it is encoded within one: without the blank that some tokenizers put in front of a text."""
    piece = Piece(start, tokenizer.encode(part, add_special_tokens=False), 0, 0)
    if not any(token.startswith(BLANKS) for token in tokenizer.encode("a", add_special_tokens=False).tokens[:1]):
        return piece
    for guard in ("\n", "|", "."):
        encoding = tokenizer.encode(guard + part, add_special_tokens=False)
        if not _is_crossed(encoding, len(guard)):
            return Piece(start, encoding, len(guard), tokens_of(encoding, len(guard), len(guard) + 1)[0])
    return piece


def _is_crossed(encoding: Encoding, at: int) -> bool:
    """Whether a token holds characters on both sides of a border."""
    first, _ = tokens_of(encoding, at, at + 1)
    if first < len(encoding) and characters_of(encoding, first)[0] < at:
        return True
    return first > 0 and characters_of(encoding, first - 1)[1] > at


def tokens_of(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """The run of tokens that hold any of the characters [start, end).

    Asks for the offsets of some twenty tokens: turning the offsets of all tokens into Python objects would cost more
    than a tenth of the whole tokenisation. A token of blanks may have an empty range at its own end; it still counts.
    """
    tokens = range(len(encoding))
    first = bisect_right(tokens, start, key=lambda token: characters_of(encoding, token)[1])
    last = bisect_left(tokens, end, key=lambda token: characters_of(encoding, token)[0])
    return first, max(first, last)


def characters_of(encoding: Encoding, token: int) -> tuple[int, int]:
    """[first character, one past the last) of a token."""
    characters = encoding.token_to_chars(token)
    assert characters is not None, "only tokens added around the text have no characters, and chats get none"
    return characters
