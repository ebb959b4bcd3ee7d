"""The 21 tasks of LongBench, their metrics, counted as its official code counts, and the averages of the usual table.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding" (2023). Scores must compare
with published ones, so what looks like a mistake there is repeated here and marked "as published". Prompt templates are
read from the user's copy (`predictions.py`). Packages, all in `pip install ds-longft[eval]`: `rouge` (1.0.1), `jieba`
(0.42.1), `fuzzywuzzy` (0.18.0 without python-Levenshtein).
"""

from __future__ import annotations

import logging
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ds_longft.errors import DataError
from ds_longft.tools.make_data.extras import needs_extra

GROUPS = ("Single-Doc QA", "Multi-Doc QA", "Summarization", "Few-shot Learning", "Synthetic", "Code")
BUCKETS = ("0-4k", "4-8k", "8k+")
"""LongBench-E's lengths, by a row's `length` (words in English, characters in Chinese)."""
PUNCTUATION_ZH = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"
    "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
PUNCTUATION = set(string.punctuation)
PUNCTUATION_WITH_ZH = PUNCTUATION | set(PUNCTUATION_ZH)

Metric = Callable[[str, str, Sequence[str]], float]
"""Of a prediction, one reference answer and the names of all classes: 0 to 1."""


@dataclass(frozen=True)
class Task:
    """One data set of LongBench."""

    name: str
    language: Literal["en", "zh", "code"]
    group: str
    max_new_tokens: int
    metric: Metric
    first_line_only: bool = False  # few-shot tasks: the model goes on with the next example
    chat: bool = True  # whether the prompt is put into the chat template
    in_e: bool = False  # whether LongBench-E has it


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
    numbers = re.findall(r"\d+", prediction)
    return sum(number == str(answer) for number in numbers) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """The same; the answer reads "Paragraph 12", or "段落12"."""
    found = re.search(r"(Paragraph |段落)(\d+)", answer)
    if found is None:
        raise DataError(f"answers: seen {answer!r}, expected 'Paragraph ' or '段落' and a number")
    return count(prediction, found[2], classes)


def code(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Similarity of characters of the first line that is no comment, in whole percent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if "`" not in x and "#" not in x and "//" not in x), "")
    return float(_fuzz().ratio(line, answer)) / 100


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


@lru_cache
def _rouge() -> Any:
    with needs_extra("eval", "LongBench's metrics"):
        from rouge import Rouge
    return Rouge()


@lru_cache
def _jieba() -> Callable[[str], list[str]]:
    with needs_extra("eval", "LongBench's metrics"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports pkg_resources
        import jieba
    jieba.setLogLevel(logging.WARNING)
    return lambda text: list(jieba.cut(text, cut_all=False))


@lru_cache
def _fuzz() -> Any:
    with needs_extra("eval", "LongBench's metrics"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would have python-Levenshtein, whose ratios differ
        from fuzzywuzzy import fuzz
    return fuzz


def check_packages() -> None:
    """Find out before hours of answers are made. Raises LongftError: a package is missing."""
    _rouge(), _jieba(), _fuzz()


SINGLE, MULTI, SUMMARY, FEW, SYNTHETIC, CODE = GROUPS
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("narrativeqa", "en", SINGLE, 128, f1),
        Task("qasper", "en", SINGLE, 128, f1, in_e=True),
        Task("multifieldqa_en", "en", SINGLE, 64, f1, in_e=True),
        Task("multifieldqa_zh", "zh", SINGLE, 64, f1_zh),
        Task("hotpotqa", "en", MULTI, 32, f1, in_e=True),
        Task("2wikimqa", "en", MULTI, 32, f1, in_e=True),
        Task("musique", "en", MULTI, 32, f1),
        Task("dureader", "zh", MULTI, 128, rouge_zh),
        Task("gov_report", "en", SUMMARY, 512, rouge, in_e=True),
        Task("qmsum", "en", SUMMARY, 512, rouge),
        Task("multi_news", "en", SUMMARY, 512, rouge, in_e=True),
        Task("vcsum", "zh", SUMMARY, 512, rouge_zh),
        Task("trec", "en", FEW, 64, classification, first_line_only=True, chat=False, in_e=True),
        Task("triviaqa", "en", FEW, 32, f1, first_line_only=True, chat=False, in_e=True),
        Task("samsum", "en", FEW, 128, rouge, first_line_only=True, chat=False, in_e=True),
        Task("lsht", "zh", FEW, 64, classification, first_line_only=True, chat=False),
        Task("passage_count", "en", SYNTHETIC, 32, count, in_e=True),
        Task("passage_retrieval_en", "en", SYNTHETIC, 32, retrieval, in_e=True),
        Task("passage_retrieval_zh", "zh", SYNTHETIC, 32, retrieval),
        Task("lcc", "code", CODE, 64, code, chat=False, in_e=True),
        Task("repobench-p", "code", CODE, 64, code, chat=False, in_e=True),
    )
}


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """The columns of the table for the tasks that are there: each group in English and in Chinese, and the averages.

    `Average_en` is the mean over the English tasks without code (14 of them), not over groups; `Average_zh` over the
    Chinese ones; `Code` stands for itself. A column is left out where one of its tasks is missing: a mean over fewer
    tasks would be compared with a mean over all.
    """
    of: dict[str, list[str]] = {language: [] for language in ("en", "zh", "code")}
    for task in TASKS.values():
        of[task.language].append(task.name)
    columns = {
        f"{group} {language}": [name for name in of[language] if TASKS[name].group == group]
        for language in ("en", "zh")
        for group in GROUPS[:-1]
    } | {"Code": of["code"], "Average_en": of["en"], "Average_zh": of["zh"]}
    return {
        column: round(sum(scores[name] for name in names) / len(names), 2)
        for column, names in columns.items()
        if set(names) <= set(scores)
    }
