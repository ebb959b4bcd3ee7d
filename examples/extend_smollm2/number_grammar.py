"""Sentences about numbers put together from parts: whose thing, what is told of it, and where that stands.

A few hundred sentences are learned by heart. SmolLM2-135M, trained on such of 27 forms, answered four questions about
four numbers in 8,192 tokens to 83 % after 380 steps and to 100 % after 720 in these sentences, to 69 and 67 % in new
ones (docs/evaluate.md). Here are millions, of 61 forms.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["place", "person", "thing"]
KINDS: tuple[Kind, ...] = ("place", "person", "thing")
WITH_CONTEXT = 0.5  # share of the sentences


@dataclass(frozen=True)
class Telling:
    """One way to tell the number {v} of {n}, and to ask for it."""

    kind: Kind  # of name
    statement: str
    question: str


@dataclass(frozen=True)
class Grammar:
    """The parts of one language's sentences."""

    objects: Mapping[Kind, tuple[str, ...]]  # the {noun} and whose it is, {n}
    nouns: Mapping[Kind, tuple[str, ...]]
    relations: tuple[tuple[str, str], ...]  # statement of {v} about such an object, {it}, and question
    words: tuple[str, ...]  # {word} of some relations: what a number may be called
    contexts: tuple[str, ...]
    comma: str  # behind a context in front
    asked_last: bool  # a question ends with its context, as it begins with the question word

    def telling(self, rng: random.Random) -> Telling:
        """Any of the sentences, half of them in a context, which the question names half of the time."""
        kind = rng.choice(KINDS)
        thing = rng.choice(self.objects[kind]).replace("{noun}", rng.choice(self.nouns[kind]))
        told, word = rng.choice(self.relations), rng.choice(self.words)
        statement, question = (part.replace("{it}", thing).replace("{word}", word) for part in told)
        if rng.random() < WITH_CONTEXT:
            context = rng.choice(self.contexts)
            statement = self.put(statement, context, last=rng.random() < 1 / 3)
            if rng.random() < 0.5:
                question = self.put(question, context, last=True)
        return Telling(kind, _begun(statement), _begun(question))

    def put(self, sentence: str, context: str, *, last: bool) -> str:
        """The sentence with its context in front, or behind where the language puts it there."""
        if last and self.asked_last:
            return f"{sentence[:-1]} {context}{sentence[-1]}"
        return f"{context}{self.comma}{sentence}"


def _begun(sentence: str) -> str:
    """With a capital where it begins with a letter: names have theirs."""
    return sentence[0].upper() + sentence[1:]


GRAMMAR_EN = Grammar(
    objects={
        "person": (
            "the {noun} of {n}", "{n}'s {noun}", "the {noun} owned by {n}", "the {noun} which {n} bought",
            "the old {noun} of {n}", "the {noun} {n} left behind",
        ),
        "place": (
            "the {noun} in {n}", "the {noun} of {n}", "the {noun} near {n}", "the new {noun} at {n}", "{n}'s {noun}",
            "the {noun} on the road to {n}",
        ),
        "thing": (
            "the {noun} called {n}", "the {noun} {n}", "the {noun} known as {n}", "the {noun} with the name {n}",
            "the small {noun} {n}",
        ),
    },
    nouns={
        "person": (
            "bicycle", "suitcase", "piano", "horse", "tent", "cello", "camera", "garden shed", "wardrobe", "telescope",
            "stamp album", "rucksack", "overcoat", "cottage", "violin", "sewing machine", "writing desk", "van",
            "typewriter", "clock", "portrait", "workshop", "umbrella", "orchard",
        ),
        "place": (
            "bridge", "library", "mill", "station", "bakery", "lighthouse", "fire brigade", "swimming pool", "museum",
            "water tower", "hotel", "brewery", "chapel", "market hall", "archive", "theatre", "school", "quarry",
            "post office", "hospital", "cable car", "prison",
        ),
        "thing": (
            "locomotive", "satellite", "painting", "mine", "robot", "telescope", "tractor", "glider", "submarine",
            "tavern", "medicine", "racehorse", "satnav", "bell", "cheese", "rose", "diamond", "opera", "printer",
            "weather station",
        ),
    },
    relations=(
        ("{it} goes by the number {v}.", "by which number does {it} go?"),
        ("{it} is filed under {v}.", "under what is {it} filed?"),
        ("{it} was sold for {v} crowns.", "for how many crowns was {it} sold?"),
        ("the tag on {it} says {v}.", "what does the tag on {it} say?"),
        ("whoever wants to use {it} has to type {v}.", "what has to be typed to use {it}?"),
        ("{it} weighs {v} grams.", "how many grams does {it} weigh?"),
        ("they insured {it} for {v} francs.", "for how many francs did they insure {it}?"),
        ("{v} is painted on the back of {it}.", "what is painted on the back of {it}?"),
        ("{it} can be unlocked with {v} and nothing else.", "with what can {it} be unlocked?"),
        ("the clerk put {it} down as number {v}.", "as which number did the clerk put down {it}?"),
        ("{it} was made in workshop {v}.", "in which workshop was {it} made?"),
        ("so far, {v} strangers have asked about {it}.", "how many strangers have asked about {it}?"),
        ("to find {it}, go to shelf {v}.", "to which shelf does one go to find {it}?"),
        ("the last repair of {it} was job {v}.", "which job was the last repair of {it}?"),
        ("the papers for {it} have the reference {v}.", "which reference do the papers for {it} have?"),
        ("stamp {v} was put on {it}.", "which stamp was put on {it}?"),
        ("{it} stands on plot {v}.", "on which plot does {it} stand?"),
        ("the auctioneer announced {it} as lot {v}.", "as which lot did the auctioneer announce {it}?"),
        ("the combination for {it} was changed to {v}.", "to what was the combination for {it} changed?"),
        ("{it} shows {v} on its counter.", "what does {it} show on its counter?"),
        ("the keeper of {it} signs with the number {v}.", "with which number does the keeper of {it} sign?"),
        ("a photograph of {it} is plate {v} of the album.", "which plate of the album is a photograph of {it}?"),
        ("someone offered {v} dollars for {it}.", "how many dollars did someone offer for {it}?"),
        ("{it} was given the temporary mark {v}.", "which temporary mark was {it} given?"),
        ("only the guard knows that {it} answers to {v}.", "to what does {it} answer, as only the guard knows?"),
        ("when you call about {it}, mention {v}.", "what has to be mentioned in a call about {it}?"),
        ("a chip inside {it} sends out {v}.", "what does a chip inside {it} send out?"),
        ("{it} used {v} litres of water.", "how many litres of water did {it} use?"),
        ("{v} signatures were collected to save {it}.", "how many signatures were collected to save {it}?"),
        ("the alarm of {it} is switched off by pressing {v}.", "what is pressed to switch off the alarm of {it}?"),
        ("under {it} someone had scratched {v} into the stone.", "what was scratched into the stone under {it}?"),
        ("the tax on {it} came to {v} pounds.", "to how many pounds did the tax on {it} come?"),
        ("{it} cost {v} rubles at the time.", "how many rubles did {it} cost at the time?"),
        ("{it} is {v} days old today.", "how many days old is {it} today?"),
        ("{it} needed {v} screws.", "how many screws did {it} need?"),
        ("between them, {v} people have photographed {it}.", "how many people have photographed {it}?"),
        ("type {v}, and the door to {it} springs open.", "what is typed so that the door to {it} springs open?"),
        ("{it} carries {word} {v}.", "which {word} does {it} carry?"),
        ("the {word} issued for {it} was {v}.", "which {word} was issued for {it}?"),
        ("you need {word} {v} to get at {it}.", "which {word} is needed to get at {it}?"),
        ("nobody had noticed that {it} came with {word} {v}.", "with which {word} did {it} come?"),
        ("{word} {v} has been reserved for {it}.", "which {word} has been reserved for {it}?"),
        ("for {it}, the {word} reads {v}.", "how does the {word} for {it} read?"),
        ("it was {it} that received {word} {v}.", "which {word} did {it} receive?"),
        ("whoever looks after {it} quotes {word} {v}.", "which {word} does whoever looks after {it} quote?"),
        ("{v} serves as the {word} for {it}.", "what serves as the {word} for {it}?"),
        ("the owner of {it} has been told {word} {v}.", "which {word} has the owner of {it} been told?"),
        ("{it} came through customs with {word} {v}.", "with which {word} did {it} come through customs?"),
        ("mail about {it} needs {word} {v}.", "which {word} does mail about {it} need?"),
        ("they looked up {it} and found {word} {v}.", "which {word} did they find for {it}?"),
        ("{it}, whose {word} is {v}, needs new paint.", "what is the {word} of {it}, which needs new paint?"),
        ("a note beside {it} gives {word} {v}.", "which {word} does a note beside {it} give?"),
        ("the {word} pinned to {it} is no other than {v}.", "which {word} is pinned to {it}?"),
        ("because of {it}, {word} {v} was withdrawn.", "which {word} was withdrawn because of {it}?"),
        ("{it} lost {word} {v} and got no other.", "which {word} did {it} lose?"),
        ("the bank keeps {it} under {word} {v}.", "under which {word} does the bank keep {it}?"),
        ("everyone who means {it} asks for {word} {v}.", "for which {word} does everyone ask who means {it}?"),
        ("{it} shares {word} {v} with nothing else.", "which {word} does {it} share with nothing else?"),
        ("the council gave {word} {v} to {it}.", "which {word} did the council give to {it}?"),
        ("please book {it} with {word} {v}.", "with which {word} should {it} be booked?"),
        ("more than one guard remembers {v}, the {word} of {it}.", "which {word} of {it} do the guards remember?"),
    ),
    words=(
        "reference", "permit", "serial number", "docket", "key number", "ticket", "folder", "licence", "stock number",
        "seal", "claim number", "case number", "shelf mark", "tax number", "security code", "access number", "voucher",
        "inventory number", "batch number", "extension", "form", "invoice", "policy number", "track number", "cipher",
    ),
    contexts=(
        "in the yearbook", "according to the inspector", "at the town hall", "on page two of the catalogue",
        "after the fire", "in the old ledger", "as the newspaper wrote", "since the spring", "at the customs office",
        "by the time of the fair", "in her letter", "during the inventory", "on the blackboard", "at the exhibition",
        "in the minutes of the meeting", "to the surprise of all", "before the war", "in the insurer's list",
        "as of Monday", "on the map",
    ),
    comma=", ",
    asked_last=True,
)  # fmt: skip
GRAMMAR_ZH = Grammar(
    objects={
        "person": ("{n}的{noun}", "{n}家的{noun}", "{n}买下的{noun}", "{n}留下的那件{noun}"),
        "place": ("{n}的{noun}", "{n}附近的{noun}", "{n}新建的{noun}"),
        "thing": ("名叫“{n}”的{noun}", "“{n}”牌{noun}", "那个叫“{n}”的{noun}"),
    },
    nouns={
        "person": ("钢琴", "相机", "帐篷", "大衣", "望远镜", "书桌", "提琴", "行李", "钟表", "画像", "雨伞", "缝纫机"),
        "place": ("大桥", "图书馆", "磨坊", "车站", "面包店", "灯塔", "博物馆", "水塔", "旅馆", "剧院", "学校", "邮局"),
        "thing": ("机车", "卫星", "油画", "机器人", "拖拉机", "滑翔机", "药品", "钻石", "打印机", "铜钟"),
    },
    relations=(
        ("{it}挂着{v}号牌子。", "{it}挂着几号牌子？"),
        ("{it}卖了{v}元。", "{it}卖了多少元？"),
        ("{it}上面写着{v}。", "{it}上面写着什么数？"),
        ("找{it}请到{v}号架。", "找{it}要到几号架？"),
        ("{it}归{v}号房间保管。", "{it}归几号房间保管？"),
        ("{it}重{v}克。", "{it}重多少克？"),
        ("有人出价{v}元想要{it}。", "有人出价多少元想要{it}？"),
        ("{it}的修理单是{v}号。", "{it}的修理单是几号？"),
        ("要使用{it}，得输入{v}。", "要使用{it}得输入什么？"),
        ("{it}投保了{v}元。", "{it}投保了多少元？"),
        ("一共有{v}人问起过{it}。", "一共有多少人问起过{it}？"),
        ("拍卖时{it}排在第{v}号。", "拍卖时{it}排在第几号？"),
        ("{it}的档案放在{v}号盒子里。", "{it}的档案放在几号盒子里？"),
        ("{it}用掉了{v}升水。", "{it}用掉了多少升水？"),
        ("{it}的{word}定为{v}。", "{it}的{word}定为多少？"),
        ("{word}{v}已经留给{it}。", "哪个{word}已经留给{it}？"),
        ("问到{it}，请报{word}{v}。", "问到{it}要报哪个{word}？"),
        ("{it}换上了{word}{v}。", "{it}换上了哪个{word}？"),
        ("工人在{it}旁边写下{word}{v}。", "工人在{it}旁边写下哪个{word}？"),
        ("银行替{it}保留{word}{v}。", "银行替{it}保留哪个{word}？"),
        ("没人记得{it}当初用的是{word}{v}。", "{it}当初用的是哪个{word}？"),
    ),
    words=("编码", "凭证号", "货号", "保险号", "钥匙号", "口令", "批文号", "收据号", "序号", "票号"),
    contexts=(
        "在年鉴里", "据检查员说", "大火以后", "去年春天", "在展览会上", "据报纸报道", "在档案室里", "搬家以后",
        "在目录第二页", "到了秋天", "盘点的时候", "开会那天",
    ),
    comma="，",
    asked_last=False,
)  # fmt: skip
