"""How numbers are told and asked for in training rows: many wordings about places, people and things.

Half of the names are made up from syllables, so that a name is found by being compared to the question, not by being
one of a few dozen: a model trained on 40 names of a kind found single numbers of names it had not met, but gave one in
three of four such numbers to the wrong name. Most sentences are put together (`number_grammar.py`, which says why), the
others are a noun in a frame or written out.

None of the wordings and names is one that `ds-longft eval needle` uses: the evaluation should ask for what was learned,
not for what was learned by heart. A test compares the two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from examples.extend_smollm2.number_grammar import GRAMMAR_EN, GRAMMAR_ZH, KINDS, Grammar, Kind, Telling

MADE_UP = 0.5  # share of the names
COMPOSED = 0.7  # share of the sentences put together by the grammar; the others are half written out, half framed
SAME_WORDS = 0.75  # share of the rows that tell all numbers in the same words


@dataclass(frozen=True)
class Speech:
    """Everything a language says around the text."""

    blank: str  # between sentences
    grammar: Grammar
    tellings: tuple[Telling, ...]
    frames: tuple[tuple[str, str], ...]  # statement and question about the number {v} of {n}, called {noun}
    nouns: tuple[str, ...]
    heads: tuple[str, ...]  # before the text
    one: tuple[str, ...]  # {q} is a question
    several: tuple[str, ...]  # {q} is several questions
    places: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    things: tuple[str, ...]
    person: str  # how {first} and {last} names stand together
    beginnings: tuple[str, ...]  # of made-up names
    place_ends: tuple[str, ...]
    first_ends: tuple[str, ...]
    last_ends: tuple[str, ...]

    @property
    def most_names(self) -> int:
        """So many different names there are of every kind."""
        ends = min(map(len, (self.place_ends, self.first_ends, self.last_ends)))
        return min(len(self.beginnings) * ends, len(self.things) * (len(self.things) - 1))

    def names(self, kind: Kind, count: int, rng: random.Random) -> list[str]:
        """Different names, of a list or made up; those of people share no part."""
        lists = {"place": (self.places,), "person": (self.first_names, self.last_names), "thing": (self.things,)}[kind]
        made_up = rng.random() < MADE_UP or count > min(map(len, lists))
        if made_up:
            lists = {
                "place": (self._made_up(self.place_ends),),
                "person": (self._made_up(self.first_ends), self._made_up(self.last_ends)),
                "thing": (tuple(map(self.blank.join, permutations(self.things, 2))),),
            }[kind]
        drawn = [rng.sample(parts, count) for parts in lists]
        if kind == "person":
            return [self.person.format(first=first, last=last) for first, last in zip(*drawn, strict=True)]
        return drawn[0]

    def _made_up(self, ends: Sequence[str]) -> tuple[str, ...]:
        return tuple(beginning + end for beginning in self.beginnings for end in ends)

    def telling(self, rng: random.Random) -> Telling:
        """A sentence of the grammar, one of `tellings`, or a frame around a noun."""
        if rng.random() < COMPOSED:
            return self.grammar.telling(rng)
        if rng.random() < 0.5:
            return rng.choice(self.tellings)
        (statement, question), noun = rng.choice(self.frames), rng.choice(self.nouns)
        kind = rng.choice(KINDS)
        return Telling(kind, statement.replace("{noun}", noun), question.replace("{noun}", noun))


EN = Speech(
    blank=" ",
    grammar=GRAMMAR_EN,
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
    frames=(
        ("The {noun} of {n} is {v}.", "What is the {noun} of {n}?"),
        ("{n} has the {noun} {v}.", "Which {noun} does {n} have?"),
        ("{v} is the {noun} of {n}.", "Which is the {noun} of {n}?"),
        ("Under {n} the list gives {v} as {noun}.", "Which {noun} does the list give under {n}?"),
        ("Somebody changed the {noun} of {n} to {v}.", "To what was the {noun} of {n} changed?"),
        ("As {noun} of {n}, the clerk wrote down {v}.", "What did the clerk write down as {noun} of {n}?"),
        ("{n} was given {v} for the {noun}.", "What was {n} given for the {noun}?"),
        ("It says here that the {noun} of {n} should read {v}.", "How should the {noun} of {n} read?"),
    ),
    nouns=(
        "file number", "order number", "customer number", "reference", "case number", "lot number", "booking number",
        "flight number", "licence", "permit", "postal code", "bank code", "model number", "vote count", "folder",
        "contract number", "route number", "page count", "key number", "queue number", "patent number", "docket",
        "record number", "mark", "height above the sea", "budget", "receipt", "telephone line", "edition", "stock",
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
    things=(
        "Heron", "Falcon", "Juniper", "Granite", "Comet", "Lantern", "Orchid", "Saffron", "Thunder", "Velvet",
        "Walnut", "Zephyr", "Amber", "Beacon", "Cobalt", "Dynamo", "Ember", "Glacier", "Indigo", "Maple", "Nebula",
        "Obsidian", "Pelican", "Quartz", "Raven", "Sable", "Topaz", "Umbra", "Viper", "Willow", "Cedar", "Drift",
        "Eclipse", "Flint", "Gazelle", "Hazel", "Ivory", "Jasper", "Kestrel", "Lotus",
    ),
    person="{first} {last}",
    beginnings=(
        "Bal", "Bran", "Cal", "Cor", "Dar", "Del", "Ev", "Fal", "Fer", "Gal", "Gor", "Hal", "Hel", "Ist", "Jar", "Kel",
        "Kor", "Lan", "Lor", "Mal", "Mor", "Nal", "Nev", "Ob", "Pel", "Por", "Ral", "Ruv", "Sal", "Sor", "Tal", "Tov",
        "Ul", "Val", "Vor", "Wal", "Wen", "Yar", "Zel", "Zor",
    ),
    place_ends=("burg", "ford", "ham", "mouth", "stead", "holm", "vik", "nitz", "ona", "aria", "port", "mere"),
    first_ends=("a", "en", "io", "ette", "us", "ine", "ovan", "eth", "imir", "ara", "ulf", "ice"),
    last_ends=("son", "ski", "man", "etti", "ov", "wick", "berg", "field", "ides", "worth", "ander", "quist"),
)  # fmt: skip
ZH = Speech(
    blank="",
    grammar=GRAMMAR_ZH,
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
    frames=(
        ("{n}的{noun}是{v}。", "{n}的{noun}是多少？"),
        ("{v}是{n}的{noun}。", "哪个数是{n}的{noun}？"),
        ("清单上{n}的{noun}写着{v}。", "清单上{n}的{noun}写着什么？"),
        ("有人把{n}的{noun}改成了{v}。", "{n}的{noun}被改成了什么？"),
    ),
    nouns=("文件号", "订单号", "客户号", "案件号", "批号", "航班号", "许可证号", "邮政编码", "合同号", "票数", "预算",
        "页数", "专利号", "收据号", "序列号", "钥匙号"),
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
    things=(
        "白鹭", "青松", "晨星", "长虹", "流云", "寒梅", "飞鱼", "金桂", "朝阳", "碧波", "红杉", "秋月", "雪峰", "银河",
        "翠竹", "黄鹂", "紫荆", "玉兰", "苍鹰", "海燕", "北斗", "丹霞", "清泉", "古槐", "麒麟", "凤凰", "天鹅", "珊瑚",
        "琥珀", "翡翠", "明珠", "火炬", "磐石", "彩蝶", "春雷", "夏荷", "惊涛", "远帆", "灵芝", "云雀",
    ),
    person="{last}{first}",
    beginnings=tuple("龙虎山林河岭石云水木金玉花草松竹梅兰菊荷雪霜雨风雷电星月日光沙滩"),
    place_ends=("头镇", "口镇", "家村", "沟村", "前乡", "里乡", "湾县", "山县", "门市", "阳市"),
    first_ends=("生", "平", "根", "儿", "妹", "宝", "发", "贵", "仙", "香"),
    last_ends=("公", "氏", "老", "大", "二", "三", "四", "五", "六", "七"),
)  # fmt: skip
SPEECH: dict[str, Speech] = {"en": EN, "zh": ZH}


def facts_about(speech: Speech, count: int, rng: random.Random) -> Sequence[tuple[str, str, str]]:
    """(statement, question, number) of so many facts, of different names and numbers.

    Three times in four all are told in the same words, so that only the name tells them apart: of four numbers asked
    for at once a small model says one twice, that of another name, long after it finds each of them alone.
    """
    if rng.random() < SAME_WORDS:
        tellings = [speech.telling(rng)] * count
    else:
        tellings = [speech.telling(rng) for _ in range(count)]
    names = {kind: speech.names(kind, count, rng) for kind in KINDS}
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
