"""LongProc's scores, as published: of the answer, and of how far a reply follows the procedure that leads to it."""

from __future__ import annotations

import csv
import operator
import re
import shutil
import string
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from ds_longft.errors import ConfigError

Scores = dict[str, float]
"""0 to 1: `score`, `partial` (how far the procedure was followed), `extracted` (an answer in the wanted form)."""

OPERATIONS: dict[str, Callable[[int, int], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip
BELIEF_WORDS = "a|an|the|on|in|at|step|thinks|think|believes|believe|is|are|of|location|know|knows|belief"
PUNCTUATION = str.maketrans("", "", string.punctuation)
HEADERS = (
    "cstdio", "iostream", "vector", "algorithm", "numeric", "cmath", "cstring", "set", "map", "queue", "stack", "list",
    "fstream", "climits", "cassert", "iomanip", "sstream", "bitset",
)  # fmt: skip
PROGRAM_RUNS, PROGRAM_S = 10, 3  # test cases of a program, and seconds for each


def countdown(reply: str, reference: str, row: dict[str, Any]) -> Scores:
    """Whether three equations make the target of the numbers, each used once."""
    solution, begin = between(reply, "Solution"), "# Search Procedure"
    if solution is not None and reaches(row["nums"], row["target"], solution):
        return _scores(1, 1, solution)
    if begin not in reply:
        return _scores(0, 0, solution)
    said = reply.rsplit(begin, maxsplit=1)[-1].strip().split("\n")
    wanted = reference.rsplit(begin, maxsplit=1)[-1].partition("Now we have found the target")[0].strip().split("\n")
    followed = _followed(said[1:], wanted[1:], _same_step) if said[0] == wanted[0] else 0.0
    return _scores(0, followed, solution)


def reaches(numbers: Sequence[int], target: int, solution: str) -> bool:
    """Whether the lines are three right equations, each of two numbers that are still there."""
    left, lines = list(numbers), solution.split("\n")
    for line in lines:
        try:
            said, result = line.split("=")
            sign = next(sign for sign in OPERATIONS if sign in said)
            a, b = map(int, said.split(sign))
            if OPERATIONS[sign](a, b) != int(result):
                return False
            left.remove(a)
            left.remove(b)
        except (ValueError, StopIteration, ZeroDivisionError):
            return False
        left.append(int(result))
    return len(lines) == len(numbers) - 1 and left[0] == target


def path_traversal(reply: str, reference: str, _: dict[str, Any]) -> Scores:
    """Whether the route is the only one; how far it goes, the first wrong line counted in."""
    route, wanted = between(reply, "Route"), reference.strip()
    if route is None:
        return _scores(0, 0, route)
    said, lines = route.split("\n"), wanted.split("\n")
    right = _alike(said, lines)
    wrong = right < min(len(said), len(lines))
    return _scores(float(route == wanted), (right + wrong) / len(lines), route)


def tom_tracking(reply: str, reference: str, _: dict[str, Any]) -> Scores:
    """Whether every step's beliefs are right; how many are, from the first on."""
    said, wanted = (_beliefs(text[max(0, text.rfind("- Step 0:")) :]) for text in (reply, reference))
    return _scores(float(said == wanted), _alike(said, wanted) / len(wanted), "")


def _beliefs(text: str) -> list[str]:
    steps = [line for line in text.strip().split("\n") if re.match(r"- Step \d+:", line)]
    plain = (line.lower().translate(PUNCTUATION).replace("\u2019", "") for line in steps)
    return [" ".join(re.sub(rf"\b({BELIEF_WORDS})\b", " ", line).split()) for line in plain]


def html_to_tsv(reply: str, reference: str, _: dict[str, Any]) -> Scores:
    """F1 of the tables' rows, in any order; `partial` is the recall."""
    fenced = re.search(r"```tsv([\s\S]*)```", reply)
    said = _table(fenced[1] if fenced else reply.split("```tsv")[:2][-1])
    wanted = _table(reference)
    if not said or not wanted or len(said[0]) != len(wanted[0]):
        return {**_scores(0, 0, None), "precision": 0.0}
    precision = sum(row in wanted for row in said) / len(said)
    recall = sum(row in said for row in wanted) / len(wanted)
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {**_scores(f1, recall, ""), "precision": precision}


def _table(text: str) -> list[list[str]] | None:
    """Rows below the header, cells without case, blanks, punctuation and articles; None where it is no table."""
    try:
        header, *rows = csv.reader(text.strip().split("\n"), delimiter="\t")
    except (csv.Error, ValueError):
        return None
    if rows and len(rows[-1]) != len(header):
        rows.pop()  # an end mark, or cut off
    if len(set(header)) < len(header):
        return None
    rows = [row if len(row) == len(header) else ["N/A"] * len(header) for row in rows]
    return [["".join(_words(cell)) for cell in row] for row in rows]


def pseudo_to_code(reply: str, _: str, row: dict[str, Any]) -> Scores:
    """Whether the program compiles and answers its test cases. It is run: only where the user allowed it."""
    fenced = re.search(r"```cpp([\s\S]*)```", reply.replace("```c++", "```cpp"))
    right = fenced is not None and runs(fenced[1], row["testcases"])
    return _scores(right, right, "" if fenced else None)


def check_compiler() -> None:
    """Raises ConfigError where there is none."""
    if shutil.which("g++") is None:
        raise ConfigError("--run_code compiles C++ programs with g++, which is not installed")


def runs(code: str, cases: Sequence[Sequence[Sequence[str]]]) -> bool:
    """Whether a C++ program gives the output of each of its first cases, within three seconds each."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "a.cpp"), Path(folder, "a.out")
        source.write_text("".join(f"#include <{name}>\n" for name in HEADERS) + f"using namespace std;\n{code}")
        compiler = ["g++", "-std=c++11", "-O", "-o", str(program), str(source)]
        if subprocess.run(compiler, capture_output=True, check=False).returncode:
            return False
        for given, wanted in cases[:PROGRAM_RUNS]:
            said = ("\n".join(given) + "\n").encode()
            try:
                made = subprocess.run([program], input=said, capture_output=True, timeout=PROGRAM_S, check=False)
            except (subprocess.TimeoutExpired, OSError):
                return False
            if made.stdout != ("\n".join(wanted) + "\n").encode():
                return False
    return True


def travel_planning(reply: str, reference: str, row: dict[str, Any]) -> Scores:
    """Whether the plan visits the cities in the only order, for the days wanted."""
    plan = between(reply, "Plan")
    cities = [city for city in row["ground_truth_cities"].split("**") if city]
    days = [int(count) for count in row["ground_truth_durations"].split("**") if count]
    if plan is not None and stops(plan)[: len(cities)] == list(zip(cities, days, strict=True)):
        return _scores(1, 1, plan)
    said, wanted = (text.replace("Output the plan in the required format:", "") for text in (reply, reference))
    begin = "<Solving Procedure>"
    said = begin + said.split(begin)[1] if begin in said else said
    wanted = begin + wanted.split(begin)[1]
    done, expected = ([line for line in text.strip().split("\n") if line.strip()] for text in (said, wanted))
    return _scores(0, _followed(done, expected, lambda a, b: " ".join(_words(b)) in " ".join(_words(a))), plan)


def stops(plan: str) -> list[tuple[str, int]]:
    """City and days of each stay: by the days of the flights, and the last day that is named."""
    ends: list[int] = []
    flights: list[tuple[str, ...]] = []
    total = None
    for line in plan.split("\n"):
        if found := re.search(r"European cities for (\d+) days", line):
            total = int(found[1])
        if found := re.search(r"\d+-(\d+)", line):
            ends.append(int(found[1]))
            if ends[-1] == total:
                break  # another plan may follow
        if found := re.search(r".*Day (\d+).*from (\w+) to (\w+)", line):
            flights.append(found.groups())
    if not ends or not flights:
        return []
    cities = [flights[0][1], *(city for _, _, city in flights)]
    days = [1, *(int(day) for day, _, _ in flights), ends[-1]]
    return [(city, leaves - comes + 1) for city, (comes, leaves) in zip(cities, pairwise(days), strict=True)]


def between(text: str, tag: str) -> str | None:
    """What stands between a tag and its end; None without both."""
    start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
    return None if -1 in (start, end) else text[start + len(tag) + 2 : end].strip()


def _scores(score: float, partial: float, answer: str | None) -> Scores:
    return {"score": float(score), "partial": float(partial), "extracted": float(answer is not None)}


def _alike(said: Sequence[str], wanted: Sequence[str]) -> int:
    """Lines that are the same, from the first on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, wanted, strict=False)))


def _followed(said: Sequence[str], wanted: Sequence[str], same: Callable[[str, str], bool]) -> float:
    """Share of the lines before the first that differs; where none does, before the last one, as published."""
    right = sum(1 for _ in takewhile(lambda pair: same(*pair), zip(said, wanted, strict=False)))
    return max(0, min(right, min(len(said), len(wanted)) - 1)) / len(wanted)


def _same_step(said: str, wanted: str) -> bool:
    """A tried operation is the same where its numbers are, and whether the branch is dropped."""
    if "|- Try" not in wanted:
        return said == wanted
    tried = [(line.partition("=")[0], "drop this branch" in line) for line in (said, wanted)]
    return tried[0] == tried[1]


def _words(text: str) -> list[str]:
    """Without case, punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


Score = Callable[[str, str, dict[str, Any]], Scores]
"""Of a reply, the reference and the row."""
_SCORES: tuple[Score, ...] = (countdown, path_traversal, tom_tracking, html_to_tsv, pseudo_to_code, travel_planning)
SCORES = {score.__name__: score for score in _SCORES}
