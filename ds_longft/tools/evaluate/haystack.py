"""A prompt with an exact number of tokens: chat template, a stretch of text with sentences hidden in it, a question."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.needle_facts import HEAD, Needle
from ds_longft.tools.evaluate.texts import Language, adds_bos, encode

T = TypeVar("T")

MARK = "\u241e"  # stands for the text while the chat template is rendered; no document holds it
TRIES = 24  # of sizes of a prompt; 3 to 5 are needed
SENTENCE_END = re.compile(r"[.!?。！？\n]\s*$")


@dataclass(frozen=True)
class Haystack:
    """Text as tokens, read from any place on, around and around if it is short."""

    ids: Sequence[int]
    ends: Sequence[bool]
    """[tokens] whether a sentence may be put in behind the token."""

    @classmethod
    def make(cls, tokenizer: Any, texts: Sequence[str]) -> Haystack:
        """Raises DataError where there is next to no text."""
        ids: list[int] = []
        ends: list[bool] = []
        for text in texts:
            # By characters: of a character in several tokens, only the last one may be an end.
            encoded = tokenizer(text + "\n\n", add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = encoded["offset_mapping"]
            following = [start for start, _ in offsets[1:]] + [len(text) + 2]
            ids += encoded["input_ids"]
            ends += [
                bool(SENTENCE_END.search(text[max(0, end - 8) : end])) and after >= end
                for (_, end), after in zip(offsets, following, strict=True)
            ]
        if len(ids) < 100:
            raise DataError(f"the haystack has {len(ids)} tokens: give a longer text")
        return cls(ids, ends)

    def stretch(self, start: int, tokens: int) -> Haystack:
        """This number of tokens from `start` on."""
        at = [(start + i) % len(self.ids) for i in range(tokens)]
        return Haystack([self.ids[i] for i in at], [self.ends[i] for i in at])

    def hide(self, sentences: Sequence[tuple[float, list[int]]]) -> tuple[list[int], list[float]]:
        """Put each sentence behind the sentence end before its depth (0 to 1); also where they then stand, 0 to 1."""
        places = sorted((self._place(depth), i) for i, (depth, _) in enumerate(sentences))
        out: list[int] = []
        starts: dict[int, int] = {}
        before = 0
        for place, i in places:
            out += self.ids[before:place]
            starts[i] = len(out)
            out += sentences[i][1]
            before = place
        out += self.ids[before:]
        return out, [starts[i] / len(out) for i in range(len(sentences))]

    def _place(self, depth: float) -> int:
        place = round(depth * len(self.ids))
        while place and not self.ends[place - 1]:
            place -= 1
        return place


@dataclass(frozen=True)
class Prompt:
    """Token ids of a whole prompt, and where in its text the sentences stand (0 to 1)."""

    ids: list[int]
    depths: list[float]


def build_prompt(
    tokenizer: Any,
    haystack: Haystack,
    needle: Needle,
    language: Language,
    *,
    tokens: int,
    depths: Sequence[float],
    rng: random.Random,
) -> Prompt:
    """A prompt of exactly `tokens` tokens, answer not counted.

    Raises:
        ConfigError: `tokens` leaves no room for text.
    """
    space = "" if language == "zh" else " "
    sentences = [encode(tokenizer, space + s + space) for s in needle.sentences]
    head, tail = chat_around(tokenizer, HEAD[language] + MARK + needle.question)
    room = tokens - len(head) - len(tail) - sum(map(len, sentences))
    if room < 16:
        raise ConfigError(f"--lengths: {tokens} tokens leave no room for text beside the question: give at least 1K")
    text = haystack.stretch(rng.randrange(len(haystack.ids)), room)
    hidden, found = text.hide(list(zip(depths, sentences, strict=True)))
    return Prompt(head + hidden + tail, found)


def chat_around(tokenizer: Any, content: str) -> tuple[list[int], list[int]]:
    """Token ids in front of and behind the mark, with the chat template around it where the tokenizer has one."""
    if tokenizer.chat_template:
        whole = chat_prompt(tokenizer, [("user", content)])
    else:
        whole = (tokenizer.bos_token if adds_bos(tokenizer) else "") + content + "\n\nAnswer:"
    head, found, tail = whole.partition(MARK)
    assert found, "the chat template dropped the user's turn"
    return encode(tokenizer, head), encode(tokenizer, tail)


def chat_prompt(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> str:
    """A chat of (role, content) in the chat template, up to where the answer begins."""
    messages = [{"role": role, "content": content} for role, content in turns]
    # Answers are short: a model that would think first (Qwen3) is asked not to. Other templates do not look at it.
    keys = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    return str(tokenizer.apply_chat_template(messages, **keys))


def without_middle(tokenizer: Any, text: str, ids: Sequence[int], most: int) -> str:
    """A text of these ids; where they are more than `most`, its first and its last half of so many, as LongBench cuts:
    decoded and joined, the result may be some tokens longer.
    """
    if len(ids) <= most:
        return text
    half = most // 2
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))


def encode_prompt(tokenizer: Any, content: str, *, begins: str = "", chat: bool = True) -> list[int]:
    """Token ids of a question, in the chat template where there is one, and of how its answer begins."""
    if chat and tokenizer.chat_template:
        return encode(tokenizer, chat_prompt(tokenizer, [("user", content)]) + begins)
    return list(tokenizer(f"{content} {begins}" if begins else content, verbose=False)["input_ids"])


def fitted(
    build: Callable[[int], T],
    ids_of: Callable[[T], list[int]],
    tokens: int,
    least: int,
    *,
    answer_tokens: int = 0,
    what: str,
) -> tuple[T, list[int]]:
    """What `build` makes of the most units such that prompt and answer have at most `tokens`, and its token ids; found
    by the secant through one that fits and one that does not.

    Raises:
        ConfigError: not even that of `least` units fits. `what`: how it is called.
    """
    limit = tokens - answer_tokens
    text = build(least)
    ids = ids_of(text)
    if len(ids) > limit:
        answer = f", its answer {answer_tokens}" if answer_tokens else ""
        told = f"{tokens:,} tokens are too few for {what}, whose shortest prompt has {len(ids):,}{answer}"
        raise ConfigError(f"--lengths: {told}")
    low, at = (least, len(ids)), 2 * least + 8
    high: tuple[int, int] | None = None
    for _ in range(TRIES):
        tried = build(at)
        tried_ids = ids_of(tried)
        here, other = (at, len(tried_ids)), high or low
        if here[1] <= limit:
            text, ids, low = tried, tried_ids, here
        else:
            high, other = here, low
        unit = max((here[1] - other[1]) / (here[0] - other[0]), 1e-2)  # tokens
        if limit - low[1] < unit or (high is not None and low[0] + 1 == high[0]):
            break
        at = low[0] + max(1, int((limit - low[1]) / unit))
        if high is not None:
            at = min(at, high[0] - 1)
    return text, ids
