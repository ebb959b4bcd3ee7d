"""Questions about a numbered text with answers that a program can check: recall, location, count, chain, absent.

A context is paragraphs, each behind its number: `[12] Call me Ishmael. ...`. `ask` makes a question and its answer from
the paragraphs; `solve` finds the answer again from nothing but the finished text and the question. A row is kept only
if both agree.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["recall", "location", "count", "chain", "absent"]
TASKS: tuple[Task, ...] = ("recall", "location", "count", "chain", "absent")
TRIES = 30
MAX_COUNT = 9


@dataclass(frozen=True)
class Wording:
    """How a language asks and answers. Each pattern reads back what the template wrote."""

    recall: str
    location: str
    count: str
    chain: str
    located: str
    absent: str
    note: str
    names: tuple[str, ...]
    things: tuple[str, ...]
    sentence: re.Pattern[str]
    sentence_chars: tuple[int, int]
    head: re.Pattern[str]  # of a sentence that is quoted by its beginning: six words, or eight Chinese characters
    word: re.Pattern[str]
    blank: str  # between two sentences


EN = Wording(
    recall='One sentence of the text begins with "{head}". Copy the rest of that sentence exactly.',
    location='In which numbered paragraph of the text does "{head}" stand?',
    count='In how many numbered paragraphs of the text does "{word}" occur? Answer with a number only.',
    chain="{first} had the {thing} at first. Following every note in the text, who has the {thing} in the end?",
    located="Paragraph {number}",
    absent="It is not in the text.",
    note="Note: {giver} handed the {thing} to {taker}.",
    names=(
        "Adelheid Brunner", "Bartholomew Quick", "Celestine Okafor", "Dmitri Halloran", "Eudora Lindqvist",
        "Fitzgerald Moon", "Gwendolyn Abara", "Horatio Pell", "Isolde Marchetti", "Jericho Vance", "Kerensa Doyle",
        "Leopold Nakamura", "Mireille Stone", "Nathaniel Crowe", "Ottilie Fane", "Percival Adeyemi",
    ),
    things=("brass key", "sealed letter", "silver compass", "blue ledger", "ivory comb", "glass lantern"),
    sentence=re.compile(r"[^.!?\[\]\"]+[.!?](?=\s|$)"),
    sentence_chars=(60, 300),
    head=re.compile(r"(?:\S+\s+){5}\S+"),
    word=re.compile(r"\b[A-Z][a-z]{3,}\b"),
    blank=" ",
)  # fmt: skip
ZH = Wording(
    recall="文中有一句话以“{head}”开头。请一字不差地写出这句话余下的部分。",
    location="“{head}”出现在文中编号为几的段落里？",
    count="文中有多少个编号的段落出现了“{word}”？只回答数字。",
    chain="{thing}起初在{first}手里。按照文中所有附记，{thing}最后在谁手里？",
    located="第{number}段",
    absent="文中没有。",
    note="附记：{giver}把{thing}交给了{taker}。",
    names=(
        "欧阳慕白", "司徒清荷", "诸葛闻笙", "上官若溪", "慕容知秋", "南宫远山", "夏侯听雨", "东方未明",
        "尉迟长风", "皇甫如晦", "公孙采薇", "令狐望舒", "端木归舟", "轩辕晚晴", "独孤明月", "长孙怀瑾",
    ),
    things=("铜钥匙", "密信", "银罗盘", "蓝账本", "象牙梳", "琉璃灯"),
    sentence=re.compile(r"[^。！？；\[\]“”\s]+[。！？；]"),
    sentence_chars=(18, 100),
    head=re.compile(r".{8}"),
    word=re.compile(r"[\u4e00-\u9fff]{2}"),
    blank="",
)  # fmt: skip
WORDINGS = {"en": EN, "zh": ZH}

_NUMBERED = re.compile(r"^\[(\d+)\] (.*)$", re.MULTILINE)


def numbered(paragraphs: Sequence[str]) -> str:
    """The context as the model sees it, one paragraph a line."""
    return "\n".join(f"[{number}] {text}" for number, text in enumerate(paragraphs, start=1))


def ask(
    task: Task, paragraphs: list[str], foreign: Sequence[str], language: str, rng: random.Random
) -> tuple[str, str] | None:
    """(question, answer), or None where the paragraphs do not lend themselves to the task.

    `chain` writes its notes into `paragraphs`. `foreign` are paragraphs of other documents, for what is absent.
    """
    words = WORDINGS[language]
    if task == "count":
        return _ask_count(paragraphs, words, rng)
    if task == "chain":
        return _ask_chain(paragraphs, words, rng)
    found = _sentence(foreign if task == "absent" else paragraphs, words, rng)
    if found is None:
        return None
    place, head, rest = found
    if task == "recall":
        return words.recall.format(head=head), rest
    if task == "location":
        return words.location.format(head=head), words.located.format(number=place + 1)
    if any(head in text for text in paragraphs):
        return None
    # What is absent is asked for like recall or location.
    return (words.recall if rng.random() < 0.5 else words.location).format(head=head), words.absent


def solve(context: str, question: str, language: str) -> str | None:
    """The answer, from the numbered text and the question alone; None where the question is none of ours.

    Independent of how the question was made: what is quoted is looked for in the text, counts are counted, chains of
    notes are followed.
    """
    words = WORDINGS[language]
    paragraphs = [(int(number), text) for number, text in _NUMBERED.findall(context)]
    if (head := _quoted(words.recall, question)) is not None:
        sentences = (found.group().strip() for _, text in paragraphs for found in words.sentence.finditer(text))
        rests = [sentence[len(head) :].strip() for sentence in sentences if sentence.startswith(head)]
        return rests[0] if len(rests) == 1 else words.absent if not rests else None
    if (head := _quoted(words.location, question)) is not None:
        places = [number for number, text in paragraphs if head in text]
        return words.located.format(number=places[0]) if len(places) == 1 else words.absent if not places else None
    if (word := _quoted(words.count, question)) is not None:
        return str(sum(_occurs(word, text) for _, text in paragraphs))
    if read := _pattern(words.chain).fullmatch(question):
        note = _pattern(words.note)
        handed = [m.groupdict() for _, text in paragraphs for m in note.finditer(text)]
        next_of = {h["giver"]: h["taker"] for h in handed if h["thing"] == read["thing"]}
        holder = read["first"]
        for _ in range(len(next_of)):
            holder = next_of.get(holder, holder)
        return holder
    return None


def _pattern(template: str) -> re.Pattern[str]:
    """Reads back what a template wrote; a field that stands twice has to hold the same."""
    parts = re.split(r"\{(\w+)\}", template)
    seen: set[str] = set()
    pattern = re.escape(parts[0])
    for name, literal in zip(parts[1::2], parts[2::2], strict=True):
        # Names and things hold no punctuation: that keeps a note apart from what stands before it.
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>[^:：。.]+?)"
        pattern += re.escape(literal)
        seen.add(name)
    return re.compile(pattern)


def _quoted(template: str, question: str) -> str | None:
    """What a question of this template quotes; None where it is none."""
    before, after = re.split(r"\{\w+\}", template)
    fits = question.startswith(before) and question.endswith(after)
    return question[len(before) : len(question) - len(after)] if fits else None


def _occurs(word: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None if word.isascii() else word in text


def _sentence(paragraphs: Sequence[str], words: Wording, rng: random.Random) -> tuple[int, str, str] | None:
    """(paragraph from 0, beginning, rest) of a random sentence of fitting length."""
    low, high = words.sentence_chars
    for _ in range(TRIES if paragraphs else 0):
        place = rng.randrange(len(paragraphs))
        found = (match.group().strip() for match in words.sentence.finditer(paragraphs[place]))
        sentences = [sentence for sentence in found if low <= len(sentence) <= high]
        if not sentences:
            continue
        sentence = rng.choice(sentences)
        start = words.head.match(sentence)
        if start is None:
            continue
        head, rest = start.group(), sentence[start.end() :].strip()
        if len(rest) >= len(head):
            return place, head, rest
    return None


def _ask_count(paragraphs: Sequence[str], words: Wording, rng: random.Random) -> tuple[str, str] | None:
    for _ in range(TRIES):
        candidates = words.word.findall(rng.choice(paragraphs))
        if not candidates:
            continue
        word = rng.choice(candidates)
        count = sum(_occurs(word, text) for text in paragraphs)
        if 2 <= count <= MAX_COUNT:
            return words.count.format(word=word), str(count)
    return None


def _ask_chain(paragraphs: list[str], words: Wording, rng: random.Random) -> tuple[str, str] | None:
    """2 to 4 notes in as many paragraphs, in any order, and as many about another thing."""
    hops = rng.randint(2, 4)
    if len(paragraphs) < 2 * hops:
        return None
    thing, other = rng.sample(words.things, 2)
    names = rng.sample(words.names, 2 * hops + 2)
    chain, decoy = names[: hops + 1], names[hops + 1 :]
    notes = [words.note.format(giver=a, taker=b, thing=thing) for a, b in itertools.pairwise(chain)]
    notes += [words.note.format(giver=a, taker=b, thing=other) for a, b in itertools.pairwise(decoy)]
    for place, note in zip(rng.sample(range(len(paragraphs)), len(notes)), notes, strict=True):
        paragraphs[place] = f"{paragraphs[place]}{words.blank}{note}"
    return words.chain.format(first=chain[0], thing=thing), chain[-1]
