"""Rows -> token ids with target spans: batches through the Rust tokenizer, and the cure for rows that are too long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ds_longft.data.pieces import characters_of, encode_pieces
from ds_longft.data.rows import BadRow, Row
from ds_longft.data.template import ChatTemplate, Rendered
from ds_longft.data.thinking import Kept, TrainTurns, chosen_turns

GAIN_MOST = 5.0  # of one target, as LongCE weighs it (arXiv 2410.23771)
TRUNCATE_ROUNDS = 8  # cutting changes a few merges at the cut: the first round is exact or off by a handful of tokens


class Overlong(BadRow):
    """A row longer than the limit that was not to be cut, or could not be cut without touching an answer."""

    kind = "overlong"
    tokens = 0  # of the row, where they are known
    targets = 0


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
    template: ChatTemplate | None  # None: plain text only, a chat is a bad row
    eos_id: int | None
    max_length_tokens: int
    overlong: Literal["drop", "truncate", "cut_turns", "error"]
    thinking: Kept = "all"
    train_turns: TrainTurns = "all"
    by_gain: bool = False  # `data.weighting: gain`

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow | BadRow]:
        """One result a row, in order: its tokens, or why it was left out (`Overlong` or another `BadRow`)."""
        results: list[EncodedRow | BadRow | None] = [None] * len(rows)
        chats: list[tuple[int, Rendered]] = []
        for i, row in enumerate(rows):
            if not row.is_text:
                try:
                    chats.append((i, self._render(row)))
                except BadRow as bad:
                    results[i] = bad
        texts = [(i, Rendered(row.turns[0].content, ())) for i, row in enumerate(rows) if row.is_text]
        for batch, plain in ((chats, False), (texts, True)):
            # plain text is trained whole: nobody asks which characters a token stands for
            encode = self.tokenizer.encode_batch_fast if plain else self.tokenizer.encode_batch
            encodings = encode([rendered.text for _, rendered in batch], add_special_tokens=plain)
            for (i, rendered), encoding in zip(batch, encodings, strict=True):
                found = self._finish(rows[i], rendered, encoding)
                results[i] = weighted_by_gain(found) if self.by_gain and isinstance(found, EncodedRow) else found
        assert all(result is not None for result in results)
        return results  # type: ignore[return-value]

    def _render(self, row: Row) -> Rendered:
        if self.template is None:
            raise BadRow("a chat, and the tokenizer has no usable chat template", "set data.chat_template")
        turns = chosen_turns(row.turns, self.thinking, self.train_turns)
        return self.template.render(turns, row.tools, own_rule=self.thinking == "last")

    def _finish(self, row: Row, rendered: Rendered, encoding: Encoding) -> EncodedRow | BadRow:
        encoded = self._plain_text(row, encoding) if row.is_text else self._chat(row, rendered, encoding)
        if encoded.targets == 0 or row.weight == 0:
            return BadRow("nothing to train on", "no answer has a weight above 0")
        length = len(encoded.input_ids)
        if length <= self.max_length_tokens:
            return encoded
        cut, reason = None, "too long"
        try:
            if row.is_text and self.overlong in ("truncate", "cut_turns"):
                reason = "too long, and plain text is trained whole, never cut"
            elif self.overlong == "truncate":
                reason, cut = "too long, and the answers alone do not fit", self._truncate(row, length)
            elif self.overlong == "cut_turns":
                reason = "too long, and no beginning of it that ends with a trained answer fits"
                cut = self._cut_turns(row, length)
        except BadRow as bad:  # the template refuses what is left
            return bad
        if cut is not None:
            return cut
        too_long = Overlong(reason, f"{length} tokens, the limit is {self.max_length_tokens}")
        too_long.tokens, too_long.targets = length, encoded.targets
        return too_long

    def _plain_text(self, row: Row, encoding: Encoding) -> EncodedRow:
        """Plain text is trained whole and ends with the end-of-sequence token; the tokenizer may put a bos first."""
        ids = encoding.ids
        if len(ids) > 1 and ids[0] == ids[1] and encoding.special_tokens_mask[0]:
            ids = ids[1:]  # the text has its bos already
        if self.eos_id is not None and (not ids or ids[-1] != self.eos_id):
            ids.append(self.eos_id)
        return _encoded(row, ids, [(0, len(ids), row.turns[0].weight)])

    def _chat(self, row: Row, rendered: Rendered, encoding: Encoding) -> EncodedRow:
        pieces = encode_pieces(self.tokenizer, rendered.text, encoding, rendered.borders)
        spans = [(*pieces.tokens_of(span.start, span.end), span.weight) for span in rendered.spans]
        unused = tuple(sorted({*row.unused, *rendered.unused}))
        return _encoded(replace(row, unused=unused), pieces.ids, spans)

    def _encode_alone(self, row: Row) -> EncodedRow:
        rendered = self._render(row)
        return self._chat(row, rendered, self.tokenizer.encode(rendered.text, add_special_tokens=False))

    def _truncate(self, row: Row, length: int) -> EncodedRow | None:
        """Cut the middle of the longest turns that are no answers until the row fits; None where it does not."""
        documents = [i for i, turn in enumerate(row.turns) if turn.role in ("system", "user", "tool")]
        parts = {i: self.tokenizer.encode(row.turns[i].content, add_special_tokens=False) for i in documents}
        excess = length - self.max_length_tokens
        for _ in range(TRUNCATE_ROUNDS):
            kept = _level({i: len(part.ids) for i, part in parts.items()}, excess)
            if kept is None:
                return None
            turns = [
                replace(turn, content=_without_middle(turn.content, parts[i], kept[i])) if i in parts else turn
                for i, turn in enumerate(row.turns)
            ]
            encoded = self._encode_alone(replace(row, turns=tuple(turns)))
            over = len(encoded.input_ids) - self.max_length_tokens
            if over <= 0:
                return replace(encoded, truncated=True)
            excess += over
        return None

    def _cut_turns(self, row: Row, length: int) -> EncodedRow | None:
        """The longest beginning of the row that fits and ends with a whole answer; nothing of it is another text."""
        answers = [i for i, turn in enumerate(row.turns) if turn.role == "assistant"][:-1]
        characters = np.cumsum([len(turn.content) + len(turn.thinking) for turn in row.turns])
        share = self.max_length_tokens / length
        fitting = int(np.searchsorted(characters[answers], share * characters[-1])) if answers else 0
        number = max(1, fitting)  # of answers that probably fit
        best: EncodedRow | None = None
        while 0 < number <= len(answers):
            encoded = self._encode_alone(replace(row, turns=row.turns[: answers[number - 1] + 1]))
            if len(encoded.input_ids) <= self.max_length_tokens:
                best, number = encoded, number + 1
            elif best is None:
                number -= 1
            else:
                break
        return None if best is None or best.targets == 0 else replace(best, truncated=True)


def weighted_by_gain(encoded: EncodedRow) -> EncodedRow | BadRow:
    """Each target times min(e^gain, `GAIN_MOST`): spans are cut where the weight changes."""
    gains, targets = encoded.row.gains, encoded.targets
    if gains is None:
        return BadRow("no token_gains", "data.weighting is gain: `ds-longft data score --tokens` writes them")
    if len(gains) < targets or (len(gains) > targets and not encoded.truncated):
        seen = f"{len(gains)} gains, {targets} targets: scored with another tokenizer, template or choice of turns?"
        return BadRow("token_gains are of other targets", seen)
    starts = np.maximum(encoded.span_start, 1)  # nothing predicts the first token
    places = np.concatenate([np.arange(a, b) for a, b in zip(starts, encoded.span_end, strict=True)])  # [targets]
    weights = np.repeat(encoded.span_weight, encoded.span_end - starts)
    weights = (weights * np.minimum(np.exp(gains[:targets]), GAIN_MOST)).astype(np.float32)
    new = np.flatnonzero((np.diff(places, prepend=-1) != 1) | (np.diff(weights, prepend=-1) != 0))
    ends = np.append(places[new[1:] - 1], places[-1]) + 1
    return replace(
        encoded, span_start=places[new].astype(np.int32), span_end=ends.astype(np.int32), span_weight=weights[new]
    )


def without_trimmed_offsets(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, whose tokens say all characters that they stand for, blanks too.

    By default those of byte-level tokenizers leave out the blank they begin with: a token that reaches over the border
    of an answer would not be seen.
    """
    content = json.loads(tokenizer.to_str())
    parts = [content.get("post_processor"), content.get("pre_tokenizer")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if "trim_offsets" in part:
                part["trim_offsets"] = False
            parts += [*(part.get("processors") or []), *(part.get("pretokenizers") or [])]
    return Tokenizer.from_str(json.dumps(content, ensure_ascii=False))


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
    end = characters_of(encoding, head - 1)[1]
    return text[:end] + (text[max(end, characters_of(encoding, total - tail)[0]) :] if tail else "")
