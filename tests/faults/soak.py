"""Runs that are struck at random moments and started again, until each has the records of one that was left alone."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.ranks import reached, trace

SOAK_STEPS = 40
LONGEST_S = 15.0  # from the start, or from its first new step, to the blow


class Soak:
    """Counts rounds: SOAK_ROUNDS of them (100), or as many as SOAK_MINUTES allow."""

    def __init__(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.name, self.capsys = name, capsys
        self.rounds = int(os.environ.get("SOAK_ROUNDS", "100"))
        self.until = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "inf"))
        self.done: Counter[str] = Counter()

    @property
    def over(self) -> bool:
        return self.done.total() >= self.rounds or time.monotonic() > self.until

    def moment(self, folder: Path, dice: random.Random, lives: Callable[[], object]) -> bool:
        """Wait for the moment of the next blow: behind the first new step, or in a third of the rounds anywhere before.

        False: the run ended by itself.
        """
        begun, first = time.monotonic(), reached(folder)
        wait_s, early = dice.uniform(0.0, LONGEST_S), dice.random() < 1 / 3
        while lives():
            time.sleep(0.05)
            if time.monotonic() > begun + wait_s and (early or reached(folder) != first):
                return True
            assert time.monotonic() < begun + 300, "it neither trains nor ends"
        return False

    def note(self, what: str, step: int) -> None:
        """One blow more."""
        self.done[what] += 1
        self.say(f"{self.done.total()}: {what}, at step {step}")

    def say(self, text: str) -> None:
        with self.capsys.disabled():
            print(f"{self.name}, {text}", flush=True)

    def run(self, output: Path, one_round: Callable[[Path], None], finish: Callable[[Path], None]) -> None:
        """One course of training after the other, each to its end, until the rounds are done."""
        output.mkdir(exist_ok=True)
        alone = output / "alone"
        finish(alone)
        course = 0
        while not self.over:
            course += 1
            folder = output / f"course {course}"
            while not self.over and reached(folder) < SOAK_STEPS:
                one_round(folder)
            finish(folder)
            assert trace(folder) == trace(alone)
            self.say(f"course {course} is bit-equal to the one left alone")
        self.say(f"{self.done.total()} rounds, {course} courses: {dict(self.done)}")
