"""Which answers keep what was thought before them, and which are trained: `data.thinking`, `data.train_turns`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ds_longft.data.rows import Turn

Kept = Literal["all", "last", "none"]
TrainTurns = Literal["all", "last"]

THINK_END = "</think>"
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def apart(turn: Turn) -> Turn:
    """An answer whose content begins with `<think>...</think>`, with the thought in `thinking`; others as they are."""
    if turn.role != "assistant" or turn.thinking or THINK_END not in turn.content:
        return turn
    thought = _THOUGHT.match(turn.content)
    if thought is None:
        return turn
    return replace(turn, thinking=thought[1].strip("\n"), content=turn.content[thought.end() :])


def within(turn: Turn) -> Turn:
    """An answer with its thought written into the content, as models without a field of its own for it write it."""
    if not turn.thinking:
        return turn
    thought = f"<think>\n{turn.thinking.strip()}\n{THINK_END}\n\n"
    return replace(turn, thinking="", content=thought + turn.content)


def chosen_turns(turns: Sequence[Turn], thinking: Kept, train: TrainTurns) -> tuple[Turn, ...]:
    """The turns with the thoughts that are kept, and weight 0 where an answer is not trained.

    `last` keeps thoughts behind the last question, which may be several in a trajectory of calls; of `train_turns` it
    leaves the last answer alone.
    """
    last_question = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    last_answer = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)

    def chosen(i: int, turn: Turn) -> Turn:
        if turn.role != "assistant":
            return turn
        drops = thinking == "none" or (thinking == "last" and i < last_question)
        kept = replace(apart(turn), thinking="") if drops else turn
        trains = (train == "all" or i == last_answer) and not kept.says_nothing  # it may have been all thought
        return kept if trains else replace(kept, weight=0.0)

    return tuple(chosen(i, turn) for i, turn in enumerate(turns))
