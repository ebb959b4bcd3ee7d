"""Texts that look like real ones, made from a seed: English and Chinese, of any length, no sentence twice."""

import random

NOUNS = [
    "harbour",
    "ledger",
    "orchard",
    "lantern",
    "senate",
    "copper",
    "engine",
    "archive",
    "meadow",
    "treaty",
    "compass",
    "granary",
]
VERBS = [
    "crossed",
    "measured",
    "repaired",
    "described",
    "remembered",
    "guarded",
    "painted",
    "counted",
    "followed",
    "traded",
]
NAMES = ["Aldous", "Brigid", "Cormac", "Desmond", "Elspeth", "Fergus", "Greta", "Hamish", "Ingrid", "Jasper"]
HAN = "山水风云日月金木火土天地人和春夏秋冬东西南北江河湖海花草树林鸟鱼马牛城门桥路书画琴棋"


def english(sentences, seed):
    rng = random.Random(seed)
    lines = []
    for i in range(sentences):
        words = [rng.choice(NAMES), rng.choice(VERBS), "the", *rng.choices(NOUNS, k=rng.randint(8, 14))]
        lines.append(" ".join(words) + f" near stone {seed}x{i}.")
    return "\n".join(lines)


def chinese(sentences, seed):
    rng = random.Random(seed)
    return "\n".join("".join(rng.choices(HAN, k=rng.randint(22, 40))) + "。" for _ in range(sentences))
