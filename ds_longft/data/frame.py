"""Where the answers lie in the text of a chat template that does not say so itself.

The frame is the template's render with a placeholder for each thing that is said. Read along it, the real text shows
where each content, thought and call lies. An answer that is words alone is trained from its first word on; one that
thinks or calls from the end of what asks for an answer on, with the marks around thoughts and calls, which the
model has to write itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_longft.data.rows import BadRow, Turn

_PLACEHOLDER = re.compile("\ue000([0-9]+)([ct]|n[0-9]+)\ue001")
_EMPTY_THOUGHT = re.compile(r"\s*(?:<think>)?\s*</think>\s*")  # its beginning may be what asks for the answer


@dataclass(frozen=True)
class Span:
    """An answer in a text, in characters."""

    start: int
    said_end: int  # one past the last of what is said
    end: int  # one past the token that closes it
    weight: float = 1.0


@dataclass(frozen=True)
class Filled:
    """Where things that are said lie in a text: (turn, "c" content, "t" thought, "n0" name of the first call, ...)."""

    at: dict[tuple[int, str], tuple[int, int]]  # first character, one past the last; in the order of the text
    length: int


def mark(turn: int, kind: str) -> str:
    """The placeholder of a thing that is said, in characters of private use."""
    return f"\ue000{turn}{kind}\ue001"


def fill(frame: str, turns: Sequence[Turn], text: str) -> Filled:
    """Read `text` along the frame. A character that does not fit is a `BadRow`."""
    literal, *rest = _PLACEHOLDER.split(frame)  # literal, turn, kind, literal, turn, kind, ..., literal
    fits, at = text.startswith(literal), len(literal)
    found: dict[tuple[int, str], tuple[int, int]] = {}
    for number, kind, following in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        turn = turns[int(number)]
        said = turn.content if kind == "c" else turn.thinking if kind == "t" else turn.calls[int(kind[1:])].name
        ends = (
            at + len(way)
            for way in _ways(said)
            if text.startswith(way, at) and text.startswith(following, at + len(way))
        )
        end = next(ends, None) if fits else None
        if end is None:
            raise BadRow("the chat template rewrites what is said", f"seen {text[at : at + 60]!r}")
        again = (int(number), kind) in found
        if turn.role == "assistant" and again and kind[0] != "n":
            raise BadRow("the chat template rewrites what is said", "an answer is there twice")
        if not again:  # a tool's result may name the call again
            found[int(number), kind] = (at, end)
        at = end + len(following)
    if at != len(text):
        raise BadRow("the chat template rewrites what is said", f"seen {text[at : at + 60]!r} at the end")
    for i, turn in enumerate(turns):
        for k, call in enumerate(turn.calls):
            if (i, f"n{k}") not in found:
                raise BadRow("the chat template leaves out a tool call", call.name)
        if turn.role == "assistant" and turn.content.strip() and (i, "c") not in found:
            if turn.calls:
                raise BadRow("the chat template leaves out words beside a tool call", turn.content[:60])
            raise BadRow(
                "the chat template rewrites what is said", "an answer is missing from its text, or there twice"
            )
    return Filled(found, len(text))


def _common(one: str, other: str) -> str:
    """What both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, min(len(one), len(other)))]


def _ways(said: str) -> tuple[str, ...]:
    """How templates write a text: as it is, trimmed, or as JSON."""
    return (
        said,
        said.strip(),
        said.lstrip(),
        said.rstrip(),
        said.strip("\n"),
        said.lstrip("\n"),
        said.rstrip("\n"),
        json.dumps(said, ensure_ascii=False)[1:-1],
    )


@dataclass(frozen=True)
class Opening:
    """What stands between a turn and the answer to it, as far as it is there before the answer is asked for."""

    header: str  # ... in a whole chat, from the end of the turn's content on
    asking: str  # its last part: what the template adds to ask for an answer

    @staticmethod
    def between(before: str, answer: str, prompt: str, bare: str, whole: str) -> Opening:
        """From three renders of one chat, in which `before` is what the last turn says and `answer` the answer.

        `prompt` ends by asking for the answer, `bare` does not, `whole` has it.
        """
        asking = prompt[len(bare) :] if prompt.startswith(bare) else ""
        told = whole.rpartition(answer)[0].rpartition(before)[2]
        header = _common(prompt.rpartition(before)[2], told)
        if not asking and told[len(header) :].strip():
            header = told  # a template that knows no asking
        return Opening(header, asking)

    def end_in(self, text: str, start: int, end: int) -> int | None:
        """One past the last character of the opening in text[start:end]; None where it is not there."""
        for part in (self.header, self.asking):
            at = text.rfind(part, start, end) if part.strip() else -1
            if at >= 0:
                return at + len(part)
        return None


@dataclass(frozen=True)
class Closing:
    """What stands behind the last argument of the last call of an answer, up to the token that closes it."""

    markup: str

    @staticmethod
    def of(argument: str, alone: str, followed: str, turn_ends: Sequence[str]) -> Closing:
        """From the render of a chat that ends with a call with this argument, and of one that goes on behind it."""
        common = _common(alone.partition(argument)[2], followed.partition(argument)[2])
        stop = min((common.find(end) for end in turn_ends if end in common), default=len(common))
        markup = common[:stop].lstrip("\"}])'").rstrip()
        return Closing(markup[markup.rfind("<") :] if "<" in markup else markup)  # the last tag: calls differ before it

    def ends_in(self, text: str, start: int, end: int, turn_ends: Sequence[str]) -> tuple[int, int]:
        """(one past the last character of the calls, one past the token that closes them). Raises `BadRow`."""
        stops = "|".join(map(re.escape, turn_ends))
        last = re.escape(self.markup) if self.markup else r"[\]}\"]"
        for pattern in (rf"({last})\s*(?:{stops})", rf"()(?:{stops})"):
            if found := re.compile(pattern).search(text, start, end):
                return found.end(1), found.end()
            at = text.rfind(self.markup, start, end) if self.markup else -1
            if at >= 0:
                return at + len(self.markup), at + len(self.markup)
        raise BadRow("the end of a tool call cannot be found", f"seen {text[start:end][-60:]!r}")


def spans_of(
    filled: Filled,
    turns: Sequence[Turn],
    text: str,
    openings: Mapping[str, Opening],
    closing: Closing,
    turn_ends: Sequence[str],
) -> dict[int, Span]:
    """The span of each answer that has a place in the text. Raises `BadRow`: a border cannot be found."""
    pieces = [(turn, kind, start, end) for (turn, kind), (start, end) in filled.at.items()]
    spans = {}
    for i, turn in enumerate(turns):
        own = [k for k, piece in enumerate(pieces) if piece[0] == i]
        if turn.role != "assistant" or not own:
            continue
        if own[-1] - own[0] != len(own) - 1:
            raise BadRow("the chat template writes other turns inside an answer", f"turn {i + 1}")
        literal = pieces[own[0] - 1][3] if own[0] else 0
        _, kind, first, _ = pieces[own[0]]
        opening = openings.get(turns[i - 1].role) if i else None
        asked = opening.end_in(text, literal, first) if opening else None
        start = first
        if kind == "c" and not turn.calls:  # blanks between the two are the model's to write
            start = asked if asked is not None and not text[asked:first].strip() else first
        elif asked is not None:  # marks around thoughts and calls are the model's too
            empty = _EMPTY_THOUGHT.match(text, asked, first) if kind != "t" else None
            start = empty.end() if empty else asked
        elif kind[0] == "n":
            raise BadRow("the beginning of a tool call cannot be found", f"seen {text[literal:first][-60:]!r}")
        _, kind, _, last = pieces[own[-1]]
        if kind[0] == "n":
            behind = pieces[own[-1] + 1][2] if own[-1] + 1 < len(pieces) else filled.length
            said_end, end = closing.ends_in(text, last, behind, turn_ends)
        else:
            said_end, end = last, closed(text, last, turn_ends)
        spans[i] = Span(start, said_end, end)
    return spans


def closed(text: str, end: int, turn_ends: Sequence[str]) -> int:
    """`end`, moved behind the token that closes the answer, so that the model learns to stop."""
    if text[:end].rstrip().endswith(tuple(turn_ends)):
        return end
    closing = re.compile(r"\s*(?:" + "|".join(map(re.escape, turn_ends)) + ")").match(text, end)
    return closing.end() if closing else end
