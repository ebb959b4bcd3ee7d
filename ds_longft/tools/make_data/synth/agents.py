"""`synth agents`: trajectories of an agent that looks for something in a small file system, each call really run.

A folder tree of made-up notes is built from the seed. The agent lists folders, searches and reads files until it has
the value that is asked for, and says it. Results are what the tools give back, so that the answer follows from them;
they are what makes the row long, as in real trajectories.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from ds_longft.tools.make_data.synth.row_plan import Wanted

WORDS = (
    "harbour", "ledger", "orchard", "lantern", "senate", "copper", "engine", "archive", "meadow", "treaty", "compass",
    "granary", "valley", "anchor", "mirror", "ribbon", "tunnel", "saddle", "quarry", "beacon", "parcel", "violin",
    "cellar", "garden", "bridge", "canvas",
)  # fmt: skip
FOLDERS = ("reports", "notes", "letters", "plans", "logs", "drafts")
LINES_OF_FILE = (60, 400)
LINE_TOKENS = 14  # of a line of a file, about
MOST_TOKENS_OF_FILE = 2 * LINE_TOKENS * LINES_OF_FILE[1]
CALL_TOKENS = 40  # of a thought and its call, about
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": text} for key, text in arguments.items()},
                "required": list(arguments),
            },
        },
    }
    for name, description, arguments in (
        ("list_folder", "Names of the files in a folder.", {"folder": "Path of the folder."}),
        ("read_file", "The whole text of a file.", {"path": "Path of the file."}),
        (
            "search",
            "Lines of the files in a folder that hold a word.",
            {"folder": "Path of the folder.", "word": "The word to look for."},
        ),
    )
]


class FileSystem:
    """Files in memory, and the tools that look into them."""

    def __init__(self, files: dict[str, list[str]]) -> None:
        self.files = files

    def run(self, name: str, arguments: dict[str, str]) -> str:
        """What a tool gives back."""
        tools: list[Callable[..., str]] = [self.list_folder, self.read_file, self.search]
        return {tool.__name__: tool for tool in tools}[name](**arguments)

    def list_folder(self, folder: str) -> str:
        """Names, one a line."""
        return "\n".join(sorted(path.rpartition("/")[2] for path in self.files if path.startswith(f"{folder}/")))

    def read_file(self, path: str) -> str:
        """The text of a file, or that there is none."""
        return "\n".join(self.files[path]) if path in self.files else f"error: no file {path}"

    def search(self, folder: str, word: str) -> str:
        """path:line: text, one a line."""
        found = [
            f"{path}:{number}: {line}"
            for path, lines in sorted(self.files.items())
            if path.startswith(f"{folder}/")
            for number, line in enumerate(lines, 1)
            if word in line
        ]
        return "\n".join(found) or "nothing found"


def agent_rows(wanted: Wanted, *, shortest_tokens: int, first: int = 0) -> Iterator[dict[str, Any]]:
    """Trajectories `first`, `first + 1`, ... of a seed as `messages` rows with `tools`, of lengths even on a
    logarithmic scale. The last file that is read may go beyond the longest by `MOST_TOKENS_OF_FILE`.
    """
    # All files are alike: measured once. Each for itself would cost three quarters of the time.
    sample = "\n".join(_lines(random.Random(wanted.seed), max(LINES_OF_FILE)))
    per_token = len(sample) / wanted.lengths.text(sample)
    for i in range(first, first + wanted.rows):
        rng = random.Random(f"{wanted.seed}:{i}")
        tokens = round(shortest_tokens * (wanted.context_tokens / shortest_tokens) ** rng.random())
        made = {"messages": _trajectory(rng, tokens, per_token), "tools": SCHEMAS}
        yield {**made, "source": wanted.name, "language": "en", "id": f"{wanted.name}-{i}"}


def _trajectory(rng: random.Random, wanted_tokens: int, per_token: float) -> list[dict[str, Any]]:
    """One agent's way to a value, read by as many files as fill the length. `per_token`: characters."""
    subject, value = f"{rng.choice(WORDS)}-{rng.randint(100, 999)}", rng.randint(1000, 9999)
    count = max(2, wanted_tokens // (LINE_TOKENS * sum(LINES_OF_FILE) // 2) + 1)
    files = {path: _lines(rng, rng.randint(*LINES_OF_FILE)) for path in sorted({_path(rng) for _ in range(count)})}
    last = _path(rng)
    files[last] = _lines(rng, rng.randint(*LINES_OF_FILE))
    fact = f"The count of {subject} is {value}."
    files[last].insert(rng.randrange(len(files[last])), fact)
    system = FileSystem(files)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You answer from the files of this folder. Use the tools; do not guess."},
        {"role": "user", "content": f"What is the count of {subject}? Give the number alone."},
    ]

    def call(thought: str, tool: str, **arguments: str) -> str:
        number = f"call{len(messages):05d}"
        request = {"type": "function", "id": number, "function": {"name": tool, "arguments": arguments}}
        result = system.run(tool, arguments)
        messages.append({"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [request]})
        messages.append({"role": "tool", "name": tool, "tool_call_id": number, "content": result})
        return result

    others = [path for path in sorted(files) if path != last]
    rng.shuffle(others)
    used = len(json.dumps(SCHEMAS)) / per_token
    listed = set()
    for path in others:
        folder = path.partition("/")[0]
        if folder not in listed:
            listed.add(folder)
            used += len(call(f"I look into {folder}.", "list_folder", folder=folder)) / per_token
        result = call(f"{path} may tell of {subject}: I read it.", "read_file", path=path)
        used += len(result) / per_token + CALL_TOKENS
        if used > wanted_tokens - LINE_TOKENS * len(files[last]):
            break
    found = call(
        f"None of these tells of {subject}: I search for it.", "search", folder=last.partition("/")[0], word=subject
    )
    call(f"The search names {found.partition(':')[0]}: I read it to be sure.", "read_file", path=last)
    messages.append({"role": "assistant", "content": str(value), "reasoning_content": f"It says: {fact}"})
    return messages


def _path(rng: random.Random) -> str:
    return f"{rng.choice(FOLDERS)}/{rng.choice(WORDS)}_{rng.randint(10, 99)}.txt"


def _lines(rng: random.Random, count: int) -> list[str]:
    return [f"{' '.join(rng.choices(WORDS, k=rng.randint(5, 9)))} {rng.randint(0, 9999)}" for _ in range(count)]
