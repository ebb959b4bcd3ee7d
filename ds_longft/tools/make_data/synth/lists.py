"""Long lists made of nothing, with questions that take more than finding one sentence that stands out.

`keys`: a line among like lines, several at once, some with several numbers. `links`: all that lies in one place,
told by lines that point to one another. `counts`: what is named most often. These are the abilities that RULER measures
(many keys, variable tracking, common and frequent words), and none of its texts: other things and wordings, made-up
names instead of its words, numbers of other lengths, links among others instead of among noise, lists that are not
numbered, and counts that differ, so that there is one right order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

from ds_longft.errors import DataError
from ds_longft.tools.make_data.synth.row_plan import Messages, Wanted, in_turns, plan_rows

ListTask = Literal["keys", "links", "counts"]
TASKS: tuple[ListTask, ...] = get_args(ListTask)

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]
NAMES = len(SYLLABLES) ** 3
THINGS = ("crate", "parcel", "trunk", "barrel", "folder", "wagon", "locker", "basket")
HOLDS = ("The {thing} called {name} weighs {value} grams.", "{name} ({thing}): {value}", "{name} | {thing} | {value}")
LIES = ("{thing} {name} lies in vault {value}.", "Vault {value} has taken in {thing} {name}.")
WITH = ("{thing} {name} lies where {other} lies.", "{thing} {name} was put beside {other}.")
BETWEEN = (", ", " / ", "\n", "; ")  # names of a list whose most frequent ones are asked for
FEWEST_UNITS = 8  # lines or names; a length that does not hold them is refused
FIRST_UNITS = 96  # by which the tokens of a line are counted first
FIT_ROUNDS = 2
MOST_AT_ONCE, MOST_LINKS, MOST_RANKS = 4, 6, 10

Asked = tuple[str, list[tuple[str, str]]]
"""A list, and questions about it with their answers."""


def list_rows(
    wanted: Wanted,
    *,
    questions: int = 3,
    tasks: Sequence[ListTask] = TASKS,
    sizes: Mapping[str, float] | None = None,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows in `messages` form, English.

    Args:
        wanted: how many rows, and how long.
        questions: asked one after the other about one list; of `counts` one.
        tasks: which, in turns.
        sizes: part of the longest row -> share of the rows; left out, `row_plan.SIZES`.
        first: the number of the first row; rows of other numbers are other rows.

    Raises:
        DataError: a length holds less than `FEWEST_UNITS` lines.
    """
    rng, measure = random.Random(f"lists {wanted.seed} {first}"), wanted.lengths.chat
    planned = plan_rows(wanted.rows, {"en": 1}, wanted.context_tokens, rng, sizes=sizes)
    for number, (_, tokens) in enumerate(planned, start=first):
        task = tasks[number % len(tasks)]
        make = partial(_asked, task, f"lists {wanted.seed} {number}", questions)
        units, each = FIRST_UNITS, 0.0
        for _ in range(FIT_ROUNDS):
            each = measure(make(units)) / units  # questions counted in: another number of lines, another share
            units = max(FEWEST_UNITS, int(tokens / each))
        while (over := measure(messages := make(units)) - tokens) > 0:
            units -= max(1, int(over / each))
        yield {"messages": messages, **wanted.identity(number, "en"), "tasks": [task]}


def _asked(task: ListTask, seed: str, questions: int, units: int) -> Messages:
    if units < FEWEST_UNITS:
        raise DataError(f"a row holds {units} lines of a list, {FEWEST_UNITS} at least: give a larger context_tokens")
    makers = {"keys": _keys, "links": _links, "counts": _counts}
    listed, asked = makers[task](units, questions, random.Random(seed))
    return in_turns(f"{listed}\n\n", asked)


def _names(count: int, rng: random.Random) -> list[str]:
    """Different ones of three syllables."""
    numbers, base = rng.sample(range(NAMES), count), len(SYLLABLES)
    return ["".join(SYLLABLES[n // base**place % base] for place in range(3)).capitalize() for n in numbers]


def _and(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def _keys(units: int, questions: int, rng: random.Random) -> Asked:
    """A line for each name, about four for some; asked for one to four names at a time."""
    thing, told, digits = rng.choice(THINGS), rng.choice(HOLDS), rng.randrange(3, 6)
    names = _names(units, rng)
    lines = [(name, str(rng.randrange(10 ** (digits - 1), 10**digits))) for name in names[: units - units // 8]]
    several = names[: max(1, units // 24)]
    lines += [(rng.choice(several), str(rng.randrange(10 ** (digits - 1), 10**digits))) for _ in range(units // 8)]
    rng.shuffle(lines)
    values: dict[str, list[str]] = {}
    for name, value in lines:
        values.setdefault(name, []).append(value)
    asked = {}
    for _ in range(questions):
        among = several if rng.random() < 1 / 3 else list(values)
        chosen = rng.sample(among, min(rng.randrange(1, MOST_AT_ONCE + 1), len(among)))
        question = f"Which numbers does the list give for {_and(chosen)}? All of each, in the order of the list."
        asked[question] = "; ".join(f"{name}: {', '.join(values[name])}" for name in chosen)
    listed = "\n".join(told.format(thing=thing, name=name, value=value) for name, value in lines)
    return listed, list(asked.items())


def _links(units: int, questions: int, rng: random.Random) -> Asked:
    """Chains of two to seven lines, mixed; each line behind the one that it points to."""
    thing, lies, beside = rng.choice(THINGS), rng.choice(LIES), rng.choice(WITH)
    names = iter(_names(units, rng))
    vaults = iter(rng.sample(range(100, 100 + 9 * units), units))
    chains: dict[int, list[str]] = {}
    left = units
    while left:
        chain = [next(names) for _ in range(min(left, rng.randrange(2, MOST_LINKS + 2)))]
        chains[next(vaults)] = chain
        left -= len(chain)
    told = {
        vault: [lies.format(thing=thing, name=chain[0], value=vault)]
        + [beside.format(thing=thing, name=name, other=other) for other, name in pairwise(chain)]
        for vault, chain in chains.items()
    }
    order = [vault for vault, chain in chains.items() for _ in chain]
    rng.shuffle(order)
    lines = [told[vault].pop(0) for vault in order]
    asked = [
        (
            f"What lies in vault {vault}, by the lines that say so and by those that lead there?",
            ", ".join(chains[vault]),
        )
        for vault in rng.sample(sorted(chains), min(questions, len(chains)))
    ]
    return "\n".join(line[0].upper() + line[1:] for line in lines), asked


def _counts(units: int, _: int, rng: random.Random) -> Asked:
    """Up to ten names more often than all others, each a different number of times."""
    ranks, seldom, between = rng.randrange(2, MOST_RANKS + 1), rng.randrange(1, 4), rng.choice(BETWEEN)
    share = rng.choice((0.0, 0.3))  # of the list that the most frequent name is; without, it gets rare in long ones
    often = [0]
    for i in range(ranks):
        often.append(max(often[-1] + 1, seldom * (4 + 2 * i), int(share * units / (ranks - i))))
    del often[0]
    while sum(often) > units // 2 and len(often) > 1:
        often.pop(0)
    often[-1] = min(often[-1], units // 2)
    common = _names(len(often) + max(1, (units - sum(often)) // seldom), rng)
    listed = [name for name, count in zip(common, often, strict=False) for _ in range(count)]
    listed += [name for name in common[len(often) :] for _ in range(seldom)]
    rng.shuffle(listed)
    wanted = list(reversed(common[: len(often)]))
    question = f"Which {len(wanted)} names come most often in this list? The most frequent first."
    if len(wanted) == 1:
        question = "Which name comes most often in this list?"
    return between.join(listed), [(question, ", ".join(wanted))]
