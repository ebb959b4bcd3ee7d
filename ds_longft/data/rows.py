"""`Row`: one training sample, whatever file layout it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool", "text"]
Kind = Literal["bad", "repeated", "overlong", "set_aside"]
"""Why a row is left out: `bad` and `repeated` are faults of the data, the others are what the config asks for."""


class BadRow(Exception):
    """A row that cannot be used, and why. Ends in the ledger, never with the user."""

    kind: Kind = "bad"

    def __init__(self, reason: str, detail: str = "") -> None:
        """`reason` is counted (keep it the same for the same fault); `detail` says what was seen in this row."""
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason} ({detail})" if detail else reason)

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        """Exceptions are pickled by their `args`; ours are two."""
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Call:
    """One call of a tool, as an answer asks for it."""

    name: str
    arguments: str  # JSON of an object
    id: str = ""  # what the result refers to, where the row names it


@dataclass(frozen=True)
class Turn:
    """One message. Role `text` is plain text outside any chat: the only turn of its row, trained whole."""

    role: Role
    content: str
    weight: float = 1.0  # 0: not trained. Counts on answers and plain text only, other roles are never trained
    thinking: str = ""  # of an answer: what was thought before it, where the row keeps it apart from the content
    calls: tuple[Call, ...] = ()  # of an answer
    name: str = ""  # of a tool's result: the tool
    call_id: str = ""  # of a tool's result: the call it answers

    @property
    def trained(self) -> bool:
        """Whether its tokens are targets."""
        return self.role in ("assistant", "text") and self.weight > 0

    @property
    def says_nothing(self) -> bool:
        """No words, no thought and no call."""
        return not (self.content.strip() or self.thinking.strip() or self.calls)


@dataclass(frozen=True)
class Row:
    """One sample: its turns in order, and where it came from."""

    turns: tuple[Turn, ...]
    source: str  # path of the source as the config names it
    origin: str  # "file:number", number of the line (JSONL) or of the record, from 1
    language: str | None = None
    weight: float = 1.0
    tools: str = ""  # JSON of a list of tool schemas, or nothing
    unused: tuple[str, ...] = ()  # what the record holds beside all this: columns, keys of messages
    gains: tuple[float, ...] | None = None  # nats that far context gains on each target (`data score --tokens`)

    @property
    def is_text(self) -> bool:
        """Plain text: goes through no chat template."""
        return self.turns[0].role == "text"
