"""Long texts to read: from any folder or JSONL file of the user, or from what lies on every machine with Python.

The English default is the Python reference that ships inside `pydoc_data`, and the docstrings of the standard library
behind it. The Chinese default is made of short sentences (there is no Chinese text on every machine): give real text
with a path where that matters.
"""

from __future__ import annotations

import ast
import gzip
import random
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.endings import SUFFIXES
from ds_longft.data.readers import read_rows
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError
from ds_longft.tools.make_data.where import Where, parse_where

Language = Literal["en", "zh"]

PLAIN = (".txt", ".md", ".rst")
COLUMNS = ("text", "content", "context", "article", "document")
CHARACTERS_A_TOKEN = 6  # more than any tokenizer takes, for the length of the built-in text

PEOPLE_ZH = ("老师", "木匠", "船长", "邻居", "画家", "医生", "农夫", "学生", "司机", "裁缝", "厨师", "守夜人")
PLACES_ZH = (
    "河边", "山脚下", "集市上", "院子里", "码头旁", "树林里", "小巷口", "桥头", "果园里", "车站前", "井边", "屋顶上",
)  # fmt: skip
TIMES_ZH = ("清晨", "午后", "傍晚", "下雨的时候", "入冬以后", "每到周末", "天刚亮时", "雪停之后", "春天里", "夜深时")
DEEDS_ZH = (
    "修理旧木凳", "和朋友谈起往年的收成", "看着船慢慢靠岸", "数着天上的雁", "把晒干的草药收进篮子",
    "给孩子们讲从前的故事", "慢慢走过石板路", "喝一碗热茶", "听远处的钟声", "打扫落叶", "写一封很长的信",
    "寻找走失的小羊", "教徒弟磨刀", "等一位老朋友",
)  # fmt: skip
ENDS_ZH = (
    "谁也没有催促。", "风从南边吹来。", "日子就这样过去。", "路上的人都放慢了脚步。", "灯一盏一盏地亮起来。",
    "大家都笑了。",
)  # fmt: skip


def read_texts(path: str | None, language: Language, *, where: str | None = None, characters: int = 0) -> list[str]:
    """The texts of a file or folder (.txt, .md, .rst, JSON, JSONL, parquet; .gz too), in order of names and rows.

    `where`: `column=value`, keeps the rows of structured files that have it. Without a path the built-in text of the
    language, at least `characters` long.

    Raises:
        ConfigError: `where` is not `column=value`.
        DataError: nothing there, nothing readable, no text column, or no row that `where` keeps.
    """
    if path is None:
        return [english(characters) if language == "en" else chinese(characters)]
    taken = Where(parse_where("--where", where))
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"no such file or folder: {path!r}")
    files = sorted(p for p in found.rglob("*") if p.is_file()) if found.is_dir() else [found]
    texts = list(chain.from_iterable(_file_texts(file, taken) for file in files))
    if not texts:
        kept = f" with {where}" if where else ""
        raise DataError(f"{path} holds no text{kept}: expected {', '.join(PLAIN + SUFFIXES)} (.gz too)")
    return texts


def _file_texts(file: Path, taken: Where) -> Iterator[str]:
    if file.name.startswith(".") or not {*PLAIN, *SUFFIXES} & set(file.suffixes):
        return
    packed = file.suffix == ".gz"
    if (file.suffixes[-2] if packed else file.suffix) in PLAIN:
        raw = file.read_bytes()
        yield (gzip.decompress(raw) if packed else raw).decode("utf-8", errors="replace")
        return
    for origin, row in read_rows(SourceConfig(path=str(file))):
        if isinstance(row, BadRow):
            raise DataError(f"{origin}: {row}")
        if not taken.takes(row):
            continue
        turns = row.get("messages")
        if (text := next((row[column] for column in COLUMNS if isinstance(row.get(column), str)), None)) is not None:
            yield text
        elif isinstance(turns, list):
            yield "\n\n".join(str(turn.get("content", "")) for turn in turns if isinstance(turn, dict))
        else:
            expected = f"expected one of {', '.join(COLUMNS)}, messages"
            raise DataError(f"{origin}: no text column; seen {', '.join(row)}, {expected}")


def english(characters: int) -> str:
    """The Python language reference, then docstrings of the standard library, until there are enough `characters`."""
    parts: list[str] = []
    try:
        from pydoc_data.topics import topics

        parts += [topics[name] for name in sorted(topics)]
    except ImportError:  # a Python without its documentation
        pass
    total = sum(map(len, parts))
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if total >= max(characters, 100_000):
            break
        docs = list(_docstrings(file))
        total += sum(map(len, docs))
        parts += docs
    return "\n\n".join(parts)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 200:
                yield doc


def chinese(characters: int) -> str:
    """Short sentences about people, places and what they do, in an order that is always the same."""
    rng = random.Random(0)
    parts: list[str] = []
    total = 0
    while total < max(characters, 20_000):
        person, place, when, deed = (rng.choice(words) for words in (PEOPLE_ZH, PLACES_ZH, TIMES_ZH, DEEDS_ZH))
        sentence = f"{when}，{person}在{place}{deed}，{rng.choice(ENDS_ZH)}"
        sentence += "\n" if rng.random() < 0.1 else ""
        parts.append(sentence)
        total += len(sentence)
    return "".join(parts)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without the marks of a chat or of a beginning."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def adds_bos(tokenizer: Any) -> bool:
    """Whether it puts the mark of a beginning in front of plain text; some have one and do not."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
