"""Needles: facts that stand in no book, questions about them, and how an answer is judged.

Forms: `single` one fact; `multi` several facts, all asked at once; `hop` a chain, where the number asked for stands
with another name; `meaning` one fact among like ones, asked for without any of its words. Names and numbers are drawn;
several wordings, so that no model knows one of them by heart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ds_longft.tools.evaluate.texts import Language

Form = Literal["single", "multi", "hop", "meaning"]

FIRST_EN = [
    "Agnes", "Bruno", "Celia", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kamila", "Lorenz",
    "Mirela", "Nadir", "Olga", "Piotr", "Quentin", "Rosa", "Stefan", "Tilda", "Ulrich", "Vera", "Wanda", "Yusuf",
]  # fmt: skip
LAST_EN = [
    "Abbott", "Barlow", "Castell", "Dunmore", "Eastley", "Farrow", "Gatling", "Hollis", "Ingram", "Jessop", "Kersey",
    "Lathom", "Merrin", "Norwood", "Oakham", "Pendle", "Quarles", "Rowley", "Selwyn", "Tarrant", "Upton", "Verney",
    "Whitcomb", "Yardley",
]  # fmt: skip
FIRST_ZH = [
    "文博", "雅琴", "志远", "秀兰", "海涛", "玉梅", "建国", "晓燕", "明辉", "春华", "立群", "慧敏",
    "振东", "淑芬", "子轩", "丽娟", "国栋", "雨桐", "少峰", "月娥", "俊杰", "思源", "永康", "若兰",
]  # fmt: skip
LAST_ZH = list("赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦许何吕施张孔")


@dataclass(frozen=True)
class Wording:
    """One way to say a fact about {a}, to say that {a}'s number is {b}'s, and to ask for {a}'s number."""

    statement: str
    link: str
    question: str


WORDINGS: dict[Language, tuple[Wording, ...]] = {
    "en": (
        Wording(
            "The locker that belongs to {a} opens with the code {v}.",
            "The locker that belongs to {a} opens with the same code as the locker of {b}.",
            "Which code opens the locker that belongs to {a}?",
        ),
        Wording(
            "At the front desk, {a} was handed the visitor badge numbered {v}.",
            "The visitor badge of {a} bears the same number as the visitor badge of {b}.",
            "What is the number on the visitor badge of {a}?",
        ),
        Wording(
            "In the harbour register, the boat of {a} is entered under {v}.",
            "In the harbour register, the boat of {a} is entered under the same number as the boat of {b}.",
            "Under which number is the boat of {a} entered in the harbour register?",
        ),
    ),
    "zh": (
        Wording("{a}的储物柜密码是{v}。", "{a}的储物柜密码与{b}的储物柜密码相同。", "{a}的储物柜密码是多少？"),
        Wording("前台发给{a}的访客证编号为{v}。", "{a}的访客证编号与{b}的访客证编号相同。", "{a}的访客证编号是多少？"),
        Wording(
            "港口登记簿上，{a}的船登记在{v}号。", "港口登记簿上，{a}的船与{b}的船登记号相同。", "{a}的船登记在多少号？"
        ),
    ),
}

LANDMARKS: dict[Language, dict[str, str]] = {
    "en": {
        "the Eiffel Tower": "Paris", "the Brandenburg Gate": "Berlin", "the Colosseum": "Rome", "Big Ben": "London",
        "the Charles Bridge": "Prague", "the Acropolis": "Athens", "the Kremlin": "Moscow", "Red Fort": "Delhi",
        "the Statue of Liberty": "New York", "the Golden Gate Bridge": "San Francisco", "Table Mountain": "Cape Town",
        "the Forbidden City": "Beijing", "the Sagrada Familia": "Barcelona", "Hagia Sophia": "Istanbul",
        "the Little Mermaid": "Copenhagen", "Christ the Redeemer": "Rio de Janeiro", "the Rialto": "Venice",
    },
    "zh": {
        "外滩": "上海", "故宫": "北京", "兵马俑": "西安", "布达拉宫": "拉萨", "西湖": "杭州",
        "宽窄巷子": "成都", "鼓浪屿": "厦门", "黄鹤楼": "武汉", "中山陵": "南京", "拙政园": "苏州",
        "埃菲尔铁塔": "巴黎", "大本钟": "伦敦", "斗兽场": "罗马", "金门大桥": "旧金山", "自由女神像": "纽约",
        "克里姆林宫": "莫斯科",
    },
}  # fmt: skip
UNLIKE: dict[Language, tuple[str, str]] = {
    "en": ("From the kitchen window of this flat you look onto {a}, and its lock opens at {v}.",
           "Which digits let somebody into the home in {a}?"),
    "zh": ("从这套公寓的厨房窗口可以望见{a}，门锁密码为{v}。", "要走进位于{a}的那个家，该按哪几个数字？"),
}  # fmt: skip
"""A statement and its question, which have no word in common but those every text has. Source: NoLiMa,
arXiv 2502.05167."""

HEAD: dict[Language, str] = {
    "en": "Read the following text carefully. A question about it comes at the end.\n\n",
    "zh": "请仔细阅读下面的文字，最后有一个关于它的问题。\n\n",
}
ASK: dict[tuple[Language, bool], str] = {
    ("en", False): "\n\n{questions} Answer with the number only.",
    ("en", True): "\n\n{questions} Answer with the numbers only, in this order, separated by commas.",
    ("zh", False): "\n\n{questions}只回答数字。",
    ("zh", True): "\n\n{questions}只回答数字，按顺序用逗号分隔。",
}


@dataclass(frozen=True)
class Needle:
    """Sentences to hide, in the order they come in the text; what to ask, and the numbers that answer it."""

    sentences: tuple[str, ...]
    question: str
    answers: tuple[str, ...]


def make_needle(form: Form, language: Language, count: int, rng: random.Random) -> Needle:
    """A needle of that form. `count`: facts of `multi`, sentences of a `hop` chain; `single` takes none;
    of `meaning`, one is asked for.
    """
    if form == "meaning":
        return _by_meaning(language, count, rng)
    wording = rng.choice(WORDINGS[language])
    number = 1 if form == "single" else count
    names = _names(language, number, rng)
    values = [str(v) for v in rng.sample(range(100_000, 1_000_000), number)]
    if form == "hop":  # name 0 is asked for, the last one has the number
        sentences = [wording.link.format(a=a, b=b) for a, b in pairwise(names)]
        sentences.append(wording.statement.format(a=names[-1], v=values[-1]))
        rng.shuffle(sentences)
        return Needle(tuple(sentences), _ask(language, wording, names[:1]), (values[-1],))
    facts = [wording.statement.format(a=name, v=value) for name, value in zip(names, values, strict=True)]
    asked = rng.sample(range(number), number)  # another order than in the text
    question = _ask(language, wording, [names[i] for i in asked])
    return Needle(tuple(facts), question, tuple(values[i] for i in asked))


def _by_meaning(language: Language, count: int, rng: random.Random) -> Needle:
    """Facts about landmarks, and a question that names the city of one of them."""
    of_city = {city: landmark for landmark, city in LANDMARKS[language].items()}
    cities = rng.sample(sorted(of_city), count)
    values = [str(v) for v in rng.sample(range(100_000, 1_000_000), count)]
    statement, question = UNLIKE[language]
    facts = [statement.format(a=of_city[city], v=value) for city, value in zip(cities, values, strict=True)]
    asked = rng.randrange(count)
    whole = ASK[language, False].format(questions=question.format(a=cities[asked]))
    return Needle(tuple(facts), whole, (values[asked],))


def judge(answers: Sequence[str], reply: str) -> tuple[bool, float]:
    """Whether the first numbers of the reply are exactly the answers, in order; and the share of answers it holds."""
    numbers = re.findall(r"\d+", reply)
    return numbers[: len(answers)] == list(answers), sum(a in numbers for a in answers) / len(answers)


def _ask(language: Language, wording: Wording, names: Sequence[str]) -> str:
    questions = (" " if language == "en" else "").join(wording.question.format(a=name) for name in names)
    return ASK[language, len(names) > 1].format(questions=questions)


def _names(language: Language, count: int, rng: random.Random) -> list[str]:
    """Different names that share no part."""
    first, last = (FIRST_EN, LAST_EN) if language == "en" else (FIRST_ZH, LAST_ZH)
    firsts, lasts = rng.sample(first, count), rng.sample(last, count)
    return [f"{f} {n}" if language == "en" else f"{n}{f}" for f, n in zip(firsts, lasts, strict=True)]
