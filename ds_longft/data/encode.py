"""Rows -> token ids with target spans: batches through the Rust tokenizer, and the cure for rows that are too long."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.data.template import ChatTemplate, Rendered

TRUNCATE_ROUNDS = 8  # cutting changes a few merges at the cut: the first round is exact or off by a handful of tokens


class Overlong(BadRow):
    """A row longer than the limit that was not to be cut, or could not be cut without touching an answer."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row and its target spans, in tokens. Every span has a weight above 0."""

    row: Row  # as encoded: truncated where it was
    input_ids: NDArray[np.int32]  # [length]
    span_start: NDArray[np.int32]  # [spans] first token
    span_end: NDArray[np.int32]  # [spans] one past the last token
    span_weight: NDArray[np.float32]  # [spans]
    truncated: bool = False

    @property
    def targets(self) -> int:
        """Labels that will be trained: every token of a span but the row's first token, which nothing predicts."""
        return int(np.sum(self.span_end - np.maximum(self.span_start, 1)))


@dataclass(frozen=True)
class Encoder:
    """Everything a process needs to encode rows. Picklable."""

    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: plain text only
    eos_id: int | None
    max_length_tokens: int
    overlong: Literal["drop", "truncate", "error"]

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow | BadRow]:
        """One result a row, in order: its tokens, or why it was left out (`Overlong` or another `BadRow`)."""
        results: list[EncodedRow | BadRow | None] = [None] * len(rows)
        chats: list[tuple[int, Rendered]] = []
        for i, row in enumerate(rows):
            if not row.is_text:
                try:
                    chats.append((i, self._render(row.turns)))
                except BadRow as bad:
                    results[i] = bad
        texts = [(i, Rendered(row.turns[0].content, ())) for i, row in enumerate(rows) if row.is_text]
        for batch, plain in ((chats, False), (texts, True)):
            # plain text is trained whole: nobody asks which characters a token stands for
            encode = self.tokenizer.encode_batch_fast if plain else self.tokenizer.encode_batch
            encodings = encode([rendered.text for _, rendered in batch], add_special_tokens=plain)
            for (i, rendered), encoding in zip(batch, encodings, strict=True):
                results[i] = self._finish(rows[i], rendered, encoding)
        assert all(result is not None for result in results)
        return results  # type: ignore[return-value]

    def _render(self, turns: Sequence[Turn]) -> Rendered:
        assert self.template is not None, "a chat template is loaded before the first chat is encoded"
        return self.template.render(turns)

    def _finish(self, row: Row, rendered: Rendered, encoding: Encoding) -> EncodedRow | BadRow:
        encoded = self._plain_text(row, encoding) if row.is_text else _chat(row, rendered, encoding)
        if encoded.targets == 0 or row.weight == 0:
            return BadRow("nothing to train on", "no answer has a weight above 0")
        if len(encoded.input_ids) <= self.max_length_tokens:
            return encoded
        if self.overlong != "truncate":
            return Overlong("too long", f"{len(encoded.input_ids)} tokens, the limit is {self.max_length_tokens}")
        try:
            return self._truncate(row, len(encoded.input_ids))
        except BadRow as bad:
            return bad

    def _plain_text(self, row: Row, encoding: Encoding) -> EncodedRow:
        """Plain text is trained whole and ends with the end-of-sequence token; the tokenizer may put a bos first."""
        ids = encoding.ids
        if self.eos_id is not None and (not ids or ids[-1] != self.eos_id):
            ids.append(self.eos_id)
        return _encoded(row, ids, [(0, len(ids), row.turns[0].weight)])

    def _truncate(self, row: Row, length: int) -> EncodedRow:
        """Cut the middle of the longest turns that are no answers until the row fits."""
        seen = f"{length} tokens, the limit is {self.max_length_tokens}"
        if row.is_text:
            raise Overlong("too long, and plain text is trained whole, never cut", seen)
        documents = [i for i, turn in enumerate(row.turns) if turn.role in ("system", "user")]
        parts = {i: self.tokenizer.encode(row.turns[i].content, add_special_tokens=False) for i in documents}
        excess = length - self.max_length_tokens
        for _ in range(TRUNCATE_ROUNDS):
            kept = _level({i: len(part.ids) for i, part in parts.items()}, excess)
            if kept is None:
                break
            turns = [
                replace(turn, content=_without_middle(turn.content, parts[i], kept[i])) if i in parts else turn
                for i, turn in enumerate(row.turns)
            ]
            rendered = self._render(turns)
            cut = replace(row, turns=tuple(turns))
            encoded = _chat(cut, rendered, self.tokenizer.encode(rendered.text, add_special_tokens=False))
            over = len(encoded.input_ids) - self.max_length_tokens
            if over <= 0:
                return replace(encoded, truncated=True)
            excess += over
        raise Overlong("too long, and the answers alone do not fit", seen)


def _chat(row: Row, rendered: Rendered, encoding: Encoding) -> EncodedRow:
    spans = [(*_tokens_of(encoding, start, end), weight) for start, end, weight in rendered.spans]
    return _encoded(row, encoding.ids, spans)


def _encoded(row: Row, ids: list[int], spans: list[tuple[int, int, float]]) -> EncodedRow:
    spans = [(start, end, weight) for start, end, weight in spans if end > start and weight > 0]
    starts, ends, weights = zip(*spans, strict=True) if spans else ((), (), ())
    return EncodedRow(
        row,
        np.asarray(ids, dtype=np.int32),
        np.asarray(starts, dtype=np.int32),
        np.asarray(ends, dtype=np.int32),
        np.asarray(weights, dtype=np.float32),
    )


def _tokens_of(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """The run of tokens that hold any of the characters [start, end).

    Asks for the offsets of some twenty tokens: turning the offsets of all tokens into Python objects would cost more
    than a tenth of the whole tokenisation. A token of blanks may have an empty range at its own end; it still counts.
    """
    tokens = range(len(encoding))
    first = bisect_right(tokens, start, key=lambda token: _characters(encoding, token)[1])
    last = bisect_left(tokens, end, key=lambda token: _characters(encoding, token)[0])
    return first, max(first, last)


def _characters(encoding: Encoding, token: int) -> tuple[int, int]:
    characters = encoding.token_to_chars(token)
    assert characters is not None, "only tokens added around the text have no characters, and chats get none"
    return characters


def _level(sizes: dict[int, int], excess: int) -> dict[int, int] | None:
    """Cut `excess` tokens off the largest sizes, down to a common level; None if less than one token each were left."""
    largest_first = sorted(sizes.values(), reverse=True)
    level = 0
    for count in range(1, len(largest_first) + 1):
        level = (sum(largest_first[:count]) - excess) // count  # if exactly the `count` largest are cut
        if count == len(largest_first) or level >= largest_first[count]:
            break
    return {i: min(size, level) for i, size in sizes.items()} if level >= 1 else None


def _without_middle(text: str, encoding: Encoding, kept_tokens: int) -> str:
    """`text` with its first and last tokens, `kept_tokens` in all, and nothing between them."""
    total = len(encoding.ids)
    if kept_tokens >= total:
        return text
    head = (kept_tokens + 1) // 2
    tail = kept_tokens - head
    end = _characters(encoding, head - 1)[1]
    return text[:end] + (text[max(end, _characters(encoding, total - tail)[0]) :] if tail else "")
