"""How numbers are told and asked for in training rows: many wordings about places, people and things.

None of them, and no name, is one that `ds-longft eval needle` uses: the evaluation should ask for what was learned, not
for what was learned by heart. A test compares the two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["place", "person", "thing"]


@dataclass(frozen=True)
class Telling:
    """One way to tell the number {v} of {n}, and to ask for it."""

    kind: Kind  # of name
    statement: str
    question: str


@dataclass(frozen=True)
class Speech:
    """Everything a language says around the text."""

    blank: str  # between sentences
    tellings: tuple[Telling, ...]
    heads: tuple[str, ...]  # before the text
    one: tuple[str, ...]  # {q} is a question
    several: tuple[str, ...]  # {q} is several questions
    places: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    family_name_first: bool
    things: tuple[str, ...]

    def names(self, kind: Kind, count: int, rng: random.Random) -> list[str]:
        """Different names; those of people share no part."""
        if kind != "person":
            return rng.sample(self.places if kind == "place" else self.things, count)
        firsts, lasts = rng.sample(self.first_names, count), rng.sample(self.last_names, count)
        if self.family_name_first:
            return [last + first for first, last in zip(firsts, lasts, strict=True)]
        return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]


EN = Speech(
    blank=" ",
    tellings=(
        Telling("place", "The secret number of {n} is {v}.", "What is the secret number of {n}?"),
        Telling("place", "Remember this: the magic number for {n} is {v}.", "Which magic number belongs to {n}?"),
        Telling("place", "{n} has the registration {v}.", "What is the registration of {n}?"),
        Telling("place", "The parcel for {n} carries the label {v}.", "Which label does the parcel for {n} carry?"),
        Telling("place", "Train {v} leaves for {n} in the evening.", "Which train leaves for {n} in the evening?"),
        Telling("place", "For calls to {n}, dial {v}.", "Which number has to be dialled for {n}?"),
        Telling("place", "The pass phrase of the {n} office is {v}.", "What is the pass phrase of the {n} office?"),
        Telling("place", "Account {v} is held by the branch in {n}.", "Which account does the branch in {n} hold?"),
        Telling("person", "{n} borrows books with library card {v}.", "What is {n}'s library card?"),
        Telling("person", "Invoice {v} was sent to {n} last week.", "Which invoice was sent to {n}?"),
        Telling("person", "To reach {n} by phone, ask for extension {v}.", "Which extension reaches {n}?"),
        Telling("person", "{n} scored {v} points in the tournament.", "How many points did {n} score?"),
        Telling("person", "The frame number of {n}'s bicycle is {v}.", "What is the frame number of {n}'s bicycle?"),
        Telling("person", "{n} won the draw with ticket {v}.", "With which ticket did {n} win the draw?"),
        Telling("person", "The insurance policy of {n} is filed as {v}.", "As what is {n}'s insurance policy filed?"),
        Telling("thing", "Project {n} may spend {v} crowns this year.", "How many crowns may project {n} spend?"),
        Telling("thing", "The engine called {n} has the serial number {v}.", "What serial number has the engine {n}?"),
        Telling("thing", "Warehouse {n} now holds {v} boxes.", "How many boxes are in warehouse {n}?"),
        Telling("thing", "The star {n} has the catalogue entry {v}.", "What is the catalogue entry of the star {n}?"),
    ),
    heads=("Read this text.\n\n", "Here is a document.\n\n", "Text:\n\n", "Some pages to read first:\n\n", ""),
    one=(
        "{q}",
        "{q} Reply with nothing but the number.",
        "{q} Just give the number.",
        "{q} A number is enough.",
    ),
    several=(
        "{q}",
        "{q} Reply with nothing but the numbers, in the order of the questions, with commas between them.",
        "{q} Just list the numbers in that order, divided by commas.",
    ),
    places=(
        "Paris", "Oslo", "Cairo", "Lima", "Quito", "Seoul", "Delhi", "Rome", "Bern", "Kyiv", "Riga", "Doha", "Hanoi",
        "Dakar", "Accra", "Tunis", "Sofia", "Minsk", "Havana", "Lisbon", "Madrid", "Dublin", "Vienna", "Prague",
        "Warsaw", "Athens", "Ankara", "Baku", "Tehran", "Kabul", "Nairobi", "Bogota", "Manila", "Jakarta", "Tallinn",
        "Zagreb", "Vilnius", "Santiago", "Caracas", "Kampala",
    ),
    first_names=(
        "Adam", "Beatrix", "Carlos", "Dora", "Edwin", "Fiona", "Gustav", "Hanna", "Ivan", "Julia", "Karim", "Leila",
        "Marcus", "Nora", "Oscar", "Paula", "Rafael", "Sonja", "Tobias", "Ursula", "Victor", "Wilma", "Xenia", "Zoltan",
        "Alvaro", "Bettina", "Cedric", "Doreen", "Emil", "Frida", "Gavin", "Helga", "Isaac", "Jasmin", "Kaspar",
        "Lucia", "Milos", "Nadine", "Otto", "Petra",
    ),
    last_names=(
        "Archer", "Bishop", "Carver", "Draper", "Ellison", "Fletcher", "Granger", "Harper", "Iverson", "Joyner",
        "Keller", "Lambert", "Mercer", "Novak", "Osborne", "Parker", "Quigley", "Ramsey", "Sawyer", "Thatcher",
        "Underwood", "Vaughan", "Weaver", "Zimmer", "Ashford", "Brandt", "Cordell", "Dalton", "Emerson", "Foster",
        "Goddard", "Hensley", "Irving", "Jarvis", "Kendall", "Larkin", "Monroe", "Nash", "Orwell", "Porter",
    ),
    family_name_first=False,
    things=(
        "Heron", "Falcon", "Juniper", "Granite", "Comet", "Lantern", "Orchid", "Saffron", "Thunder", "Velvet",
        "Walnut", "Zephyr", "Amber", "Beacon", "Cobalt", "Dynamo", "Ember", "Glacier", "Indigo", "Maple", "Nebula",
        "Obsidian", "Pelican", "Quartz", "Raven", "Sable", "Topaz", "Umbra", "Viper", "Willow", "Cedar", "Drift",
        "Eclipse", "Flint", "Gazelle", "Hazel", "Ivory", "Jasper", "Kestrel", "Lotus",
    ),
)  # fmt: skip
ZH = Speech(
    blank="",
    tellings=(
        Telling("place", "{n}的秘密数字是{v}。", "{n}的秘密数字是多少？"),
        Telling("place", "开往{n}的列车车次为{v}。", "开往{n}的列车车次是多少？"),
        Telling("place", "寄往{n}的包裹贴着{v}号标签。", "寄往{n}的包裹贴着几号标签？"),
        Telling("place", "打电话到{n}，请拨{v}。", "打电话到{n}要拨什么号？"),
        Telling("person", "{n}用{v}号借书证借书。", "{n}用几号借书证借书？"),
        Telling("person", "{n}在比赛中得了{v}分。", "{n}在比赛中得了多少分？"),
        Telling("person", "上周寄给{n}的发票是{v}号。", "上周寄给{n}的发票是几号？"),
        Telling("thing", "“{n}”工程今年可用{v}元。", "“{n}”工程今年可用多少元？"),
        Telling("thing", "“{n}”仓库现存{v}箱货物。", "“{n}”仓库现存多少箱货物？"),
    ),
    heads=("请阅读这段文字。\n\n", "下面是一份材料。\n\n", ""),
    one=("{q}", "{q}请只写数字。", "{q}直接给出数字即可。"),
    several=("{q}", "{q}请按提问的次序写出这些数字，中间用逗号隔开。"),
    places=(
        "北京", "上海", "广州", "成都", "西安", "南京", "武汉", "杭州", "昆明", "青岛", "长沙", "福州", "沈阳", "兰州",
        "桂林", "拉萨", "大连", "厦门", "合肥", "贵阳", "苏州", "宁波", "无锡", "济南", "洛阳", "太原", "南昌", "银川",
        "西宁", "海口", "珠海", "温州", "扬州", "徐州", "大同", "包头", "吉林", "丹东", "开封", "宜昌",
    ),
    first_names=(
        "一鸣", "佳琪", "嘉豪", "静怡", "浩然", "梦洁", "天佑", "欣然", "宏伟", "婉清", "书恒", "可欣", "新宇", "美玲",
        "泽民", "诗涵", "伟强", "佩玲", "家豪", "思敏", "博远", "晶莹", "光耀", "雪莲", "凯文", "紫薇", "正阳", "素云",
        "鹏飞", "桂英", "启航", "巧珍", "松涛", "翠屏", "世杰", "采薇", "景行", "若曦", "维新", "冬梅",
    ),
    last_names=tuple("刘黄林徐高马罗梁宋谢唐邓曹彭曾萧田董袁潘于邱蔡余杜叶程魏薛阎苏丁任卢姚钟姜崔谭陆"),
    family_name_first=True,
    things=(
        "白鹭", "青松", "晨星", "长虹", "流云", "寒梅", "飞鱼", "金桂", "朝阳", "碧波", "红杉", "秋月", "雪峰", "银河",
        "翠竹", "黄鹂", "紫荆", "玉兰", "苍鹰", "海燕", "北斗", "丹霞", "清泉", "古槐", "麒麟", "凤凰", "天鹅", "珊瑚",
        "琥珀", "翡翠", "明珠", "火炬", "磐石", "彩蝶", "春雷", "夏荷", "惊涛", "远帆", "灵芝", "云雀",
    ),
)  # fmt: skip
SPEECH: dict[str, Speech] = {"en": EN, "zh": ZH}


def facts_about(speech: Speech, count: int, rng: random.Random) -> Sequence[tuple[str, str, str]]:
    """(statement, question, number) of so many facts, of different names and numbers.

    Three times in four all are told in the same words, so that only the name tells them apart: of four numbers asked
    for at once a small model says one twice, that of another name, long after it finds each of them alone.
    """
    if rng.random() < 0.75:
        tellings = [rng.choice(speech.tellings)] * count
    else:
        tellings = [rng.choice(speech.tellings) for _ in range(count)]
    names: dict[Kind, list[str]] = {kind: speech.names(kind, count, rng) for kind in ("place", "person", "thing")}
    numbers: set[int] = set()
    while len(numbers) < count:
        digits = rng.randint(4, 8)
        numbers.add(rng.randrange(10 ** (digits - 1), 10**digits))
    told = zip(tellings, rng.sample(sorted(numbers), count), strict=True)
    facts = []
    for telling, number in told:
        name = names[telling.kind].pop()
        facts.append((telling.statement.format(n=name, v=number), telling.question.format(n=name), str(number)))
    return facts
