"""`ds-longft eval reason`: questions that one place of a text does not answer, made here at any length.

`coreference`: a long conversation in which the same is asked for several times, and the second of these answers is
wanted back (after OpenAI's MRCR). `walks`: a graph as a list of edges, and the nodes at a given number of steps (after
its GraphWalks). Scores as published: the likeness of two texts, and F1 of two sets of nodes.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ds_longft.errors import ConfigError
from ds_longft.tools.evaluate.evaluation import Made, Question, Result, Row, evaluate_on_ranks, mean_with_interval
from ds_longft.tools.evaluate.flags import FLAGS, Flags, default_lengths, listed, print_tables, token_list
from ds_longft.tools.evaluate.haystack import chat_prompt, encode_prompt, fitted
from ds_longft.tools.evaluate.texts import encode

if TYPE_CHECKING:
    from ds_longft.tools.evaluate.answering import Answering

ANSWER_TOKENS = {"coreference": 192, "walks": 256}
ASKED_TIMES = 4  # the same request in a conversation
STEPS, DEGREE = 2, 2  # of a walk: at most four nodes are the answer
FEWEST_UNITS = 16  # exchanges or edges; a length that does not hold them is refused
FORMS = ("note", "letter", "riddle", "report", "recipe", "speech", "diary entry", "song")
TOPICS = (
    "tapirs", "lighthouses", "bread", "violins", "glaciers", "postage stamps", "beehives", "bicycles", "volcanoes",
    "tea", "clocks", "harbours", "owls", "bridges", "snow", "gardens", "trains", "mirrors", "salt", "kites",
)  # fmt: skip
WORDS = (
    "amber", "basin", "candle", "drum", "ember", "ferry", "gravel", "hazel", "ivory", "jacket", "kettle", "ladder",
    "meadow", "needle", "orchard", "pebble", "quarry", "ribbon", "saddle", "timber", "umbrella", "valley", "willow",
)  # fmt: skip

Judge = Callable[[str], float]
Asked = tuple[list[int], list[str], Judge]
"""A prompt, what is wanted, and the score of a reply (0 to 1)."""


def reason(
    model: str,
    *,
    lengths: str | None = None,
    tasks: str = "coreference,walks",
    rows: int = 20,
    seed: int = 0,
    flags: Flags = FLAGS,
) -> None:
    """Ask for the second of four like answers in a long conversation, and for nodes of a long graph two steps away.

    Args:
        lengths: tokens of the prompt, e.g. 4K,32K,128K. Left out: the model's window and four halvings of it.
        tasks: coreference, walks, or both.
        rows: of each task and length.
        seed: the same seed asks the same questions.
    """
    arguments = dict(locals())
    chosen = listed(tasks)
    if rows < 1 or not chosen or not set(chosen) <= set(TASKS):
        raise ConfigError(f"--tasks is {tasks!r}, --rows is {rows}: expected {', '.join(TASKS)}, and 1 or more")
    sizes = None if lengths is None else token_list("--lengths", lengths)

    evaluate_on_ranks("eval reason", arguments, lambda answering: _measure(answering, chosen, sizes, rows, seed), _show)


def _measure(answering: Answering, tasks: list[str], lengths: list[int] | None, rows: int, seed: int) -> Result:
    sizes = lengths or default_lengths(answering.window)

    def made(task: str, size: int, i: int) -> Made:
        ids, wanted, judge = filled(task, answering.tokenizer, f"{seed} {i}", size)
        return ids, lambda reply, _: {
            "task": task, "length_tokens": size, "prompt_tokens": len(ids), "answers": wanted, "reply": reply,
            "score": round(judge(reply), 4),
        }  # fmt: skip

    def summary(found: list[Row]) -> dict[str, Any]:
        of = {
            (task, size): [100 * row["score"] for row in found if (row["task"], row["length_tokens"]) == (task, size)]
            for task, size in product(tasks, sizes)
        }
        table = {task: {str(size): mean_with_interval([of[task, size]]) for size in sizes} for task in tasks}
        return {"by_length": table, "samples": sorted(found, key=lambda row: row["score"])[:4]}

    questions = {
        f"{task}/{size}/{i}": Question(size, ANSWER_TOKENS[task], partial(made, task, size, i))
        for size, task, i in product(sizes, tasks, range(rows))
    }
    settings = {"tasks": tasks, "lengths": sizes, "rows": rows, "seed": seed}
    return answering.ask("reason", settings, questions, summary)


def filled(task: str, tokenizer: Any, seed: str, tokens: int) -> Asked:
    """The largest prompt of at most `tokens` tokens. Raises ConfigError: that of `FEWEST_UNITS` parts is longer."""
    build = partial(TASKS[task], tokenizer, seed)
    return fitted(build, lambda asked: asked[0], tokens, FEWEST_UNITS, what=task)[0]


def coreference(tokenizer: Any, seed: str, units: int) -> Asked:
    """A conversation with this many requests, `ASKED_TIMES` of them for the same."""
    rng = random.Random(f"coreference {seed}")
    kinds = list(product(FORMS, TOPICS))
    rng.shuffle(kinds)
    asked, *others = kinds
    code = "".join(rng.choices("abcdefghjkmnpqrstuvwxyz23456789", k=8))
    places = {i * units // ASKED_TIMES + rng.randrange(units // ASKED_TIMES) for i in range(ASKED_TIMES)}
    turns, same = [], []
    for i in range(units):
        form, topic = asked if i in places else rng.choice(others)
        text = _written(topic, rng)
        if i in places:
            same.append(text)
        turns += [("user", f"Write a {form} about {topic}."), ("assistant", text)]
    form, topic = asked
    wanted = f"{code} {same[1]}"
    turns.append(("user", f"Put {code} in front of the second {form} about {topic}, and repeat it word by word."))
    if tokenizer.chat_template:
        ids = encode(tokenizer, chat_prompt(tokenizer, turns))
    else:
        said = "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)
        ids = tokenizer(f"{said}\n\nAssistant:", verbose=False)["input_ids"]
    return list(ids), [wanted], lambda reply: likeness(reply, wanted, code)


def likeness(reply: str, wanted: str, code: str) -> float:
    """How alike two texts are; 0 without the code in front, as published, blanks around the reply aside."""
    reply = reply.strip()
    if not reply.startswith(code):
        return 0.0
    said, asked = (text.removeprefix(code).strip() for text in (reply, wanted))
    return difflib.SequenceMatcher(None, said, asked).ratio()


def walks(tokenizer: Any, seed: str, units: int) -> Asked:
    """A graph with this number of edges, each node with `DEGREE` of them, and the nodes `STEPS` away from one."""
    rng = random.Random(f"walks {seed}")
    count = max(2 * DEGREE, units // DEGREE)
    nodes = [f"{number:06x}" for number in rng.sample(range(16**5, 16**6), count)]
    edges = {
        node: rng.sample([other for other in rng.sample(nodes, DEGREE + 1) if other != node], DEGREE) for node in nodes
    }
    start = rng.choice(nodes)
    seen, front = {start}, {start}
    for _ in range(STEPS):
        front = {other for node in front for other in edges[node]} - seen
        seen |= front
    listing = [f"{node} -> {other}" for node, others in edges.items() for other in others]
    rng.shuffle(listing)
    content = (
        "Here is a directed graph, one edge a line.\n\n" + "\n".join(listing) + f"\n\nWhich nodes are exactly {STEPS} "
        f"steps away from {start}, and not nearer? Follow the edges forwards. Name these nodes alone, separated by "
        "commas, or say none."
    )
    wanted = sorted(front)
    return encode_prompt(tokenizer, content), wanted, lambda reply: f1(wanted, re.findall(r"\b[0-9a-f]{6}\b", reply))


def f1(wanted: list[str], found: list[str]) -> float:
    """Of two sets; 1 where both are empty."""
    right = len(set(wanted) & set(found))
    total = len(set(wanted)) + len(set(found))
    return 2 * right / total if total else 1.0


TASKS: dict[str, Callable[[Any, str, int], Asked]] = {"coreference": coreference, "walks": walks}


def _written(topic: str, rng: random.Random) -> str:
    """A text that no other is quite like."""
    said = [
        f"The {rng.choice(WORDS)} and the {rng.choice(WORDS)} went to see the {topic} {rng.randrange(2, 90)} times.",
        f"Nobody near the {rng.choice(WORDS)} had thought of {topic} since the {rng.choice(WORDS)} was painted.",
        f"With a {rng.choice(WORDS)} in hand, one soon learns what {topic} owe to the {rng.choice(WORDS)}.",
        f"That is why {topic} stand beside the {rng.choice(WORDS)} {rng.choice(WORDS)} until today.",
    ]
    rng.shuffle(said)
    return " ".join(said)


def _show(result: dict[str, Any], path: Path) -> None:
    sizes = result["settings"]["lengths"]
    table = Table("score, %", *(f"{size:,}" for size in sizes))
    for task, of_size in result["by_length"].items():
        table.add_row(task, *(f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, low, high in of_size.values()))
    print_tables(path, table)
