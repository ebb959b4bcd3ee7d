"""The texts of RULER's tasks (Hsieh et al., 2024), made of what is drawn from a random generator.

Wordings, numbers of needles, hops and repetitions, and the order of the draws are the published ones: with the same
draws, lm-eval's code makes the same text (tests/unit/tools/evaluate/test_ruler.py). Where that code and NVIDIA's
differ, it is NVIDIA's: common words come behind an example with its answer. Not as there: sentences end by punctuation
alone (theirs by nltk's model, which is a download), and where there are not words enough in `wonderwords`, common words
are `adjective-noun` pairs (theirs are of another list).
"""

from __future__ import annotations

import math
import random
import re
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ds_longft.tools.make_data.extras import needs_extra

SHUFFLE_SEED = 42  # of orders that are the same in every row
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)
NIAH_BEGINS = "The special magic {kind} for {query} mentioned in the provided text {are}"
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above."
)
TRACKING_BEGINS = (  # "assgined" as published
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {query}, they are: "
)
HOPS = 4
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_BEGINS = "Answer: The top 10 words that appear most often in the list are:"
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
FREQUENT_BEGINS = "Answer: According to the coded text above, the three most frequently appeared words are:"
ASKED = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
DOCUMENTS = ASKED + "\n\nThe following are given documents.\n\n{context}\n\n" + ASKED + "\n\nQuestion: {query}"
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent
SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Text:
    """What is asked, how the answer begins, and what it should hold."""

    asked: str
    begins: str
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack: keys, values of each, how many are asked for; what the haystack and a key are made of."""

    hay: str  # noise, essay, needles
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"

    def text(self, units: int, essay: Sequence[str], rng: random.Random) -> Text:
        """`units`: words of the essay, or sentences. The essay begins again where it ends."""
        keys, values = [], []
        for _ in range(max(self.keys, self.queries)):
            keys.append(_drawn(self.key_kind, rng))
            values.append([_drawn(self.value_kind, rng) for _ in range(self.values)])
        needles = [self._needle(key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
        random.Random(SHUFFLE_SEED).shuffle(needles)
        context = self._hidden(needles, units, essay, rng)
        asked = rng.sample(range(len(keys)), self.queries)
        *others, last = [keys[i] for i in asked]
        query = f"{', '.join(others)}, and {last}" if others else last
        one = self.queries * self.values == 1
        template, kind = NIAH, self.value_kind
        if one:
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            kind = kind[:-1]
        begins = NIAH_BEGINS.format(kind=kind, query=query, are="is" if one else "are")
        wanted = tuple(value for i in asked for value in values[i])
        return Text(template.format(kind=kind, context=context, query=query), begins, wanted)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _hidden(self, needles: Sequence[str], units: int, essay: Sequence[str], rng: random.Random) -> str:
        if self.hay == "essay":
            sentences = SENTENCE.split(" ".join(around(essay, units)).strip())
            places = sorted(int(len(sentences) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles)))
            parts: list[str] = []
            for start, end, needle in zip([0, *places], places, needles, strict=False):
                parts += [" ".join(sentences[start:end]), needle]
            return " ".join([*parts, " ".join(sentences[places[-1] :])])
        if self.hay == "noise":
            lines = [NOISE] * units
        else:
            lines = [self._needle(_drawn(self.key_kind, rng), _drawn(self.value_kind, rng)) for _ in range(units)]
        at = sorted(rng.sample(range(units), len(needles)), reverse=True)
        for place, needle in zip(at, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def tracking(units: int, rng: random.Random, *, letters: int = 5) -> Text:
    """Variables that take one another's value, among `units` times the noise."""
    names: list[str] = []
    while len(set(names)) < HOPS + 1:  # all anew where one came twice
        names = ["".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in range(HOPS + 1)]
    value = rng.randrange(10000, 99999)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(HOPS)]
    sentences = [NOISE + "\n"] * units
    for i, place in enumerate(sorted(rng.sample(range(units), len(chain)))):
        sentences.insert(place + i, chain[i])
    context = " ".join(sentences).replace(". \n", ".\n")
    begins = TRACKING_BEGINS.format(count=HOPS + 1, query=value)
    return Text(TRACKING.format(context=context, query=value), begins, tuple(names))


def with_example(example: Text, text: Text, rng: random.Random) -> Text:
    """Behind an example of tracking with its answer, whose variables are named anew in each row."""
    shown = f"{example.asked} {example.begins} {' '.join(example.wanted)}\n\n"
    for name in example.wanted:
        shown = shown.replace(name, "".join(rng.choices(string.ascii_uppercase, k=len(name))))
    return Text(f"{shown}\n\n{text.asked}", text.begins, text.wanted)


def common_words(units: int, length_tokens: int, rng: random.Random) -> Text:
    """Ten of `units` words appear more often than the others."""
    short = length_tokens < 4096
    shown, answers = _word_list(20, 3, 1, rng) if short else _word_list(40, 10, 3, rng)
    context, wanted = _word_list(units, 6, 1, rng) if short else _word_list(units, 30, 3, rng)
    example = f"{COMMON.format(context=shown)} {COMMON_BEGINS}{_numbered(answers)}"
    return Text(f"{example}\n{COMMON.format(context=context)}", COMMON_BEGINS, tuple(wanted))


def _word_list(units: int, often: int, seldom: int, rng: random.Random) -> tuple[str, list[str]]:
    if units <= len(plain_words()):
        words = rng.sample(plain_words(), units)
    else:
        pairs = Pairs.of_package()
        words = [pairs[i] for i in rng.sample(range(len(pairs)), units)]
    common = words[:10]
    listed = common * often + words[10:] * seldom
    rng.shuffle(listed)
    return _numbered(listed), common


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def frequent_words(units: int, length_tokens: int, rng: random.Random) -> Text:
    """Coded words, the k-th about `units` / zeta(2) k^2 times; the most frequent one is dots."""
    count = length_tokens // 50
    words: set[str] = {"".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(count)}
    while len(words) < count:
        words.add("".join(rng.choices(string.ascii_lowercase, k=6)))
    coded = sorted(words)
    random.Random(SHUFFLE_SEED).shuffle(coded)
    coded[0] = "..."
    zeta = math.pi**2 / 6
    text = [word for k, word in enumerate(coded, 1) for _ in range(int(units * k**-2.0 / zeta))]
    random.Random(SHUFFLE_SEED).shuffle(text)
    return Text(FREQUENT.format(context=" ".join(text)), FREQUENT_BEGINS, tuple(coded[1:4]))


@dataclass(frozen=True)
class Question:
    """One that documents answer. `near`: of the same article, which come before others."""

    query: str
    wanted: tuple[str, ...]
    documents: tuple[int, ...]
    near: tuple[int, ...] = ()


def question_answering(question: Question, documents: Sequence[str], units: int, rng: random.Random) -> Text:
    """`units` documents; all of them, around and around, where there are fewer."""
    gold, near = list(question.documents), list(question.near)
    if units >= len(documents):
        chosen = around(documents, units)
    elif units - len(gold) > len(near):
        taken = {*gold, *near}
        others = [i for i in range(len(documents)) if i not in taken]
        chosen = [documents[i] for i in gold + near + rng.sample(others, units - len(taken))]
    else:
        chosen = [documents[i] for i in gold + rng.sample(near, units - len(gold))]
    random.Random(SHUFFLE_SEED).shuffle(chosen)
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(chosen, 1))
    return Text(DOCUMENTS.format(context=context, query=question.query), "Answer:", question.wanted)


def around(parts: Sequence[str], count: int) -> list[str]:
    """The first `count` parts, beginning again where they end."""
    return (list(parts) * -(-count // len(parts)))[:count]


def _drawn(kind: str, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return rng.choice(Pairs.of_package())


@dataclass(frozen=True)
class Pairs(Sequence[str]):
    """Every `adjective-noun`, made when it is asked for: they are six million."""

    adjectives: Sequence[str]
    nouns: Sequence[str]

    @classmethod
    @lru_cache
    def of_package(cls) -> Pairs:
        """Of `wonderwords`."""
        return cls(_listed("adjective"), _listed("noun"))

    def __len__(self) -> int:
        return len(self.adjectives) * len(self.nouns)

    def __getitem__(self, i: int) -> str:  # type: ignore[override]
        return f"{self.adjectives[i // len(self.nouns)]}-{self.nouns[i % len(self.nouns)]}"


@lru_cache
def plain_words() -> list[str]:
    """Nouns, adjectives and verbs, in the published order."""
    words = sorted({*_listed("noun"), *_listed("adjective"), *_listed("verb")})
    random.Random(SHUFFLE_SEED).shuffle(words)
    return words


def _listed(kind: str) -> list[str]:
    with needs_extra("eval", "RULER's words"):
        from wonderwords import RandomWord
    return sorted(set(RandomWord()._categories[kind]))
