"""A long-code set out of the Python standard library on this machine: nothing to download, answers that can be checked.

A row lays modules into one long context and asks for a function in it: its whole definition, its signature or its
docstring. The answer is the exact text of the context. The same seed gives the same rows on the same Python.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import sysconfig
import tokenize
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from ds_longft.errors import DataError
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.row_plan import Messages, Wanted, in_turns

Part = Literal["train", "eval"]
Question = Literal["definition", "signature", "docstring"]

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"}  # dull, or not for reading
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "lib-dynload"}
MAX_ANSWER_LINES = 30
MIN_DEFINITION_LINES = 4
MIN_DOCSTRING_CHARS = 60
EVAL_SHARE = 0.1  # of the modules
TRIES = 50
MIN_MODULE_LINES = 20
CHARS_PER_TOKEN = 2.8  # of Python source, low rather than high; used without a tokenizer, and as a first guess
MAX_CHARS_PER_TOKEN = 8.0
CLOSE_ENOUGH_TOKENS = 8  # about a line

QUESTIONS: dict[Question, str] = {
    "definition": "Copy the complete definition of the function `{name}` from {file}, exactly as it stands there.",
    "signature": "Copy the signature of the function `{name}` from {file}, exactly as it stands there, colon included.",
    "docstring": "Copy the docstring of the function `{name}` from {file}, exactly as it stands there, with quotes.",
}


@dataclass(frozen=True)
class Target:
    """A function that can be asked for. Line numbers count from 1 and include both ends."""

    name: str
    first: int
    last: int
    answers: dict[Question, str]


@dataclass(frozen=True, eq=False)
class Module:
    """One file of the library."""

    name: str  # path below the library, with slashes
    lines: tuple[str, ...]  # each with its line end
    targets: tuple[Target, ...]

    def excerpt(self, first: int, last: int) -> str:
        """Lines `first` to `last` under a header that names the file."""
        whole = first == 1 and last == len(self.lines)
        note = "" if whole else f" (lines {first}-{last})"
        return f"# file: {self.name}{note}\n{''.join(self.lines[first - 1 : last]).rstrip()}\n\n"

    def around(self, first: int, last: int, margin: int) -> str:
        """These lines, and so many before and behind them."""
        return self.excerpt(max(1, first - margin), min(len(self.lines), last + margin))


def code_rows(wanted: Wanted, *, questions: int, part: Part) -> Iterator[dict[str, Any]]:
    """Rows in `messages` form, most of them shorter than the longest by a few lines of code at most.

    Args:
        wanted: how many rows, and how long; estimated lengths by `CHARS_PER_TOKEN`.
        questions: how many are asked of one context, one after the other; fewer where the module has no more to ask.
        part: `train` and `eval` never share a module.

    Raises:
        DataError: the length is too small to hold a function and its question, or the library has no source here.
    """
    names = module_names(part)
    ruler = _Ruler(wanted.lengths)
    rng = random.Random(f"{wanted.seed} {part}")
    for number in range(wanted.rows):
        messages, about = _row(rng, names, wanted.context_tokens, questions, ruler)
        identity = {"source": wanted.name, "language": "en", "id": f"{part}-{wanted.seed}-{number}"}
        yield {"messages": messages, **identity, **about}


def module_names(part: Part) -> list[str]:
    """Files of the library that belong to a part, sorted. A file's part follows from its name alone."""
    library = _library()
    files = []
    for folder, below, inside in os.walk(library):
        below[:] = set(below) - LEFT_OUT - NOT_THE_LIBRARY
        files += [Path(folder, file).relative_to(library).as_posix() for file in inside if file.endswith(".py")]
    drawn = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8 for name in files}
    names = [name for name in sorted(files) if (drawn[name] < EVAL_SHARE) == (part == "eval")]
    if not names:
        raise DataError(f"the Python standard library has no source at {library}: install Python with its .py files")
    return names


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@cache
def read_module(name: str) -> Module | None:
    """A file of the library with the functions that can be asked for; None if it cannot be read as Python."""
    try:
        with tokenize.open(_library() / name) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None
    lines = tuple(re.findall(r"[^\n]*\n|[^\n]+", source))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    names = [node.name for node in functions]
    once = [node for node in functions if names.count(node.name) == 1 and not node.name.startswith("__")]
    targets = [Target(n.name, n.lineno, n.end_lineno or n.lineno, _answers(n, lines)) for n in once]
    return Module(name, lines, tuple(target for target in targets if target.answers))


def _answers(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: tuple[str, ...]) -> dict[Question, str]:
    """Source text of each question that is worth asking about a function: neither trivial nor long."""
    answers: dict[Question, str] = {}
    end = node.end_lineno or node.lineno
    if MIN_DEFINITION_LINES <= end - node.lineno + 1 <= MAX_ANSWER_LINES:
        answers["definition"] = "".join(lines[node.lineno - 1 : end]).rstrip()
    if len(node.args.args) + len(node.args.kwonlyargs) > 2 and node.body[0].lineno > node.lineno:
        head = "".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).rstrip()
        if head.endswith(":"):  # otherwise a comment or decorator lies between the signature and the body
            answers["signature"] = head.strip()
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        docstring = "".join(lines[first.lineno - 1 : first.end_lineno]).strip()
        alone = docstring.endswith(('"', "'"))  # on its lines: no comment or statement behind it
        if alone and len(docstring) >= MIN_DOCSTRING_CHARS and docstring.count("\n") < MAX_ANSWER_LINES:
            answers["docstring"] = docstring
    return answers


class _Ruler:
    """Measures text in tokens, each module once."""

    def __init__(self, lengths: Lengths) -> None:
        self.text, self.chat = lengths.text, lengths.chat
        self.of_module = cache(lambda module: self.text(module.excerpt(1, len(module.lines))))


def _row(
    rng: random.Random, names: list[str], limit: int, questions: int, ruler: _Ruler
) -> tuple[Messages, dict[str, str]]:
    """One row of at most `limit` tokens, and what is in it."""
    for _ in range(TRIES):
        module = read_module(rng.choice(names))
        if module is None or not module.targets:
            continue
        target = rng.choice(module.targets)
        # One question about it, and the others about its neighbours, so that all of them fit into one excerpt.
        near = sorted(module.targets, key=lambda t: abs(t.first - target.first))[:questions]
        asked = [(t, rng.choice(sorted(t.answers))) for t in near]

        pairs = [(QUESTIONS[kind].format(name=t.name, file=module.name), t.answers[kind]) for t, kind in asked]
        left = limit - ruler.chat(in_turns("", pairs))
        # The module, or the lines around the functions where it is longer; None if not even those fit.
        around = partial(module.around, min(t.first for t in near), max(t.last for t in near))
        own = _longest(around, len(module.lines), left // 2, ruler) if left > 0 else None
        if own is None:
            continue
        order = rng.sample(names, len(names))
        place = rng.random()
        asked_names = [t.name for t in near]
        for slack in (0, 4, 16, 64):  # the parts may be a few tokens shorter than the whole
            pieces = _fill(_without(asked_names, module, order), left - ruler.text(own) - slack, ruler)
            pieces.insert(int(place * (len(pieces) + 1)), own)
            messages = in_turns("".join(pieces), pairs)
            if ruler.chat(messages) <= limit:
                kinds = ", ".join(kind for _, kind in asked)
                return messages, {"file": module.name, "topics": ", ".join(asked_names), "kind": kinds}
    raise DataError(f"rows of {limit} tokens are too short for a function and its question: give 1K or more")


def _without(functions: list[str], own: Module, names: list[str]) -> Iterator[Module]:
    """The other modules of these names, in order, that define no such function."""
    defined = re.compile(rf"\bdef ({'|'.join(map(re.escape, functions))})\b")
    modules = (read_module(name) for name in names if name != own.name)
    return (m for m in modules if m and len(m.lines) >= MIN_MODULE_LINES and not any(map(defined.search, m.lines)))


def _fill(modules: Iterable[Module], limit: int, ruler: _Ruler) -> list[str]:
    """Whole modules as long as they fit into `limit` tokens, then the beginning of the first that does not."""
    pieces = []
    for module in modules:
        end = len(module.lines)
        if sum(map(len, module.lines)) <= limit * MAX_CHARS_PER_TOKEN and ruler.of_module(module) <= limit:
            pieces.append(module.excerpt(1, end))
            limit -= ruler.of_module(module)
            continue
        start = _longest(lambda count, module=module: module.excerpt(1, count + 1), end - 1, limit, ruler)  # type: ignore[misc]
        return [*pieces, start] if start is not None else pieces
    return pieces


def _longest(excerpt: Callable[[int], str], high: int, limit: int, ruler: _Ruler) -> str | None:
    """The longest of `excerpt(0)`, ..., `excerpt(high)` (ever longer) of at most `limit` tokens; may be a line short.

    Guesses from the tokens per character seen so far, so that long text is not measured over and over.
    """
    best, low, per_token = None, 0, CHARS_PER_TOKEN
    while low <= high:
        guess = bisect_right(range(low, high + 1), limit * per_token, key=lambda n: len(excerpt(n))) - 1 + low
        text = excerpt(max(guess, low))
        tokens = ruler.text(text)
        per_token = len(text) / tokens
        if tokens <= limit:
            best, low = text, max(guess, low) + 1
            if guess < low - 1 or limit - tokens < CLOSE_ENOUGH_TOKENS:
                break
        else:
            high = max(guess, low) - 1
    return best
