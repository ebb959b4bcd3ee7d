"""LongBench's metrics, one prediction against one reference answer, 0 to 1. As its official code counts, quirks kept.

Scores must be comparable with published ones, so what looks like a mistake there is repeated here and marked "as
published". Packages: `rouge` (1.0.1), `jieba` (0.42.1), `fuzzywuzzy` (0.18.0 without python-Levenshtein), all in
`pip install ds-longft[eval]`.
"""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ds_longft.errors import ConfigError, DataError
from ds_longft.tools.evaluate.longbench.tasks import Metric

PUNCTUATION_ZH = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"
    "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
PUNCTUATION = set(string.punctuation)
PUNCTUATION_WITH_ZH = PUNCTUATION | set(PUNCTUATION_ZH)
Scorer = Callable[[str, str, Sequence[str]], float]


def check_packages() -> None:
    """Find out before hours of answers are made. Raises ConfigError: a package is missing."""
    _rouge(), _jieba(), _fuzz()


def f1(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Overlap of English words, articles, case and punctuation aside."""
    return _overlap(_words(prediction), _words(answer))


def f1_zh(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Overlap of Chinese words as jieba cuts them."""
    return _overlap(_words_zh(prediction), _words_zh(answer))


def rouge(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """ROUGE-L F of the texts; 0 where the package refuses one of them, such as an empty prediction (as published)."""
    package = _rouge()
    try:
        return float(package.get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except Exception:  # whatever it is, the official code counts 0
        return 0.0


def rouge_zh(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """ROUGE-L F over jieba's words."""
    cut = _jieba()
    return rouge(" ".join(cut(prediction)), " ".join(cut(answer)), classes)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / (how many class names the prediction holds), if the right one is among them."""
    matches = [name for name in classes if name in prediction]
    for name in matches:  # removing while iterating skips the next one, as published
        if name in answer and name != answer:
            matches.remove(name)
    return 1.0 / len(matches) if answer in matches else 0.0


def count(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the answer."""
    return _share_of_numbers(prediction, answer)


def retrieval(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """The same; the answer reads "Paragraph 12"."""
    return _share_of_numbers(prediction, _number_in(answer, "Paragraph "))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """The same; the answer reads "段落12"."""
    return _share_of_numbers(prediction, _number_in(answer, "段落"))


def code(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Similarity of characters of the first line that is no comment, in whole percent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if "`" not in x and "#" not in x and "//" not in x), "")
    return float(_fuzz().ratio(line, answer)) / 100


SCORERS: Mapping[Metric, Scorer] = {
    "f1": f1,
    "f1_zh": f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code": code,
}


def _overlap(prediction: list[str], answer: list[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    bare = "".join(c for c in text.lower() if c not in PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _words_zh(text: str) -> list[str]:
    words = ("".join(c for c in word.lower() if c not in PUNCTUATION_WITH_ZH) for word in _jieba()(text))
    return [bare for word in words if (bare := "".join(word.split()))]


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return sum(number == str(wanted) for number in numbers) / len(numbers) if numbers else 0.0


def _number_in(answer: str, word: str) -> str:
    found = re.search(rf"{word}(\d+)", answer)
    if found is None:
        raise DataError(f"answers: seen {answer!r}, expected {word!r} and a number")
    return found[1]


@lru_cache
def _rouge() -> Any:
    try:
        from rouge import Rouge
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return Rouge()


@lru_cache
def _jieba() -> Callable[[str], list[str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports pkg_resources
            import jieba
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    jieba.setLogLevel(logging.WARNING)
    return lambda text: list(jieba.cut(text, cut_all=False))


@lru_cache
def _fuzz() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would have python-Levenshtein, whose ratios differ
            from fuzzywuzzy import fuzz
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    return fuzz


def _missing(error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(f"LongBench's metrics need the package {error.name}: pip install 'ds-longft[eval]'")
