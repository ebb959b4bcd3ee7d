"""What an evaluation is made of before torch is imported: its questions, its start, and how far a mean may be off.

A process that only starts others needs no more than this.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_longft.command_line import as_words
from ds_longft.errors import ConfigError
from ds_longft.ranks.join import visible_gpus
from ds_longft.tools.evaluate.flags import Flags, Ranks

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

Row = dict[str, Any]
Result = tuple[Row, Path] | None
"""A finished result and its file, on the process that writes; None on the others."""
Made = tuple[list[int], Callable[[str, float], Row]]
"""A prompt, and from the reply and its seconds the fields of its row."""
DRAWS = 2000


@dataclass(frozen=True)
class Question:
    """A prompt that is not made before it is asked: thousands of long ones would not fit."""

    tokens: int  # of the prompt, at most: those of one size are asked together
    answer_tokens: int
    make: Callable[[], Made]
    also_stop: tuple[int, ...] = ()
    least_tokens: int = 0  # of the answer

    @property
    def alike(self) -> tuple[Any, ...]:
        """What those have in common that are asked together."""
        return self.tokens, self.answer_tokens, self.also_stop, self.least_tokens


def fingerprint(parts: Iterable[Any]) -> str:
    """Tells what a model is asked from anything else: the same path may hold other texts the next time."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(json.dumps(part).encode() + b"\n")
    return whole.hexdigest()[:12]


def mean_with_interval(groups: Sequence[Sequence[float]]) -> list[float]:
    """[mean, low, high]: the mean of the groups' means, and where 95 % of it lie when each group's rows are drawn anew
    (bootstrap).

    Groups are tasks or places in the text: every one counts the same. Where each has one row alone, which drawn anew is
    itself, all are drawn as one. The same groups give the same interval.
    """
    rng = np.random.default_rng(0)
    if all(len(group) == 1 for group in groups):
        groups = [[value for (value,) in groups]]
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    drawn = [group[rng.integers(len(group), size=(DRAWS, len(group)))].mean(1) for group in values]  # [DRAWS] each
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return [round(float(x), 4) for x in (np.mean([group.mean() for group in values]), low, high)]


def evaluate_on_ranks(
    command: str,
    arguments: dict[str, Any],
    measure: Callable[[Answering], Result],
    show: Callable[[Row, Path], None],
    flags: Flags | None = None,
) -> None:
    """Run `ds-longft COMMAND` with these arguments, `model` and `flags` among them, on the ranks of the flags.

    `flags`: of a command that takes others than all of `Flags`. `measure` is called on every process that works, `show`
    on the one that has the result.

    Raises:
        ConfigError, SystemExit: as `start_ranks`.
    """
    flags = flags or arguments["flags"]
    if start_ranks(command, arguments["flags"], arguments):
        return
    from ds_longft.tools.evaluate.answering import Answering  # brings torch
    from ds_longft.tools.evaluate.processes import Processes

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with Processes.of_launch(flags.sp) as processes:
        made = measure(Answering(processes, arguments["model"], flags))
    show_result(made, flags.json, show)


def start_ranks(command: str, flags: Ranks, arguments: dict[str, Any]) -> bool:
    """Run `ds-longft COMMAND` with these arguments on as many processes as the flags say; False where there is
    nothing to start: one is enough, or a launcher has started this one.

    Raises:
        ConfigError: flags that do not go together, or more processes than GPUs of this machine.
        SystemExit: with the code of the rank that failed.
    """
    flags.check()
    ranks = flags.ranks
    if ranks == 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1 or "SLURM_STEP_ID" in os.environ:
        return False
    gpus = visible_gpus()
    if gpus and ranks > gpus:
        raise ConfigError(f"--gpus or --sp asks for {ranks} GPUs, this machine has {gpus}")
    from ds_longft.ranks.launch import launch_ranks

    argv = [*command.split(), *as_words(arguments)]
    code = launch_ranks("ds_longft.cli", argv, ranks=ranks, gpus=gpus)
    if code:
        raise SystemExit(code)
    return True


def show_result(made: Result, as_json: bool, tables: Callable[[Row, Path], None]) -> None:
    """As one JSON object or for people; nothing where another process has it."""
    if made is None:
        return
    if as_json:
        print(json.dumps(made[0], ensure_ascii=False))
    else:
        tables(*made)
