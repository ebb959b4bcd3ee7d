"""Which language a row is in: by its characters for Chinese, Japanese and Korean, by py3langid for the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ds_longft.data.rows import Turn
from ds_longft.tools.make_data.extras import needs_extra

UNKNOWN = "und"  # ISO 639: undetermined
SAMPLE_CHARS = 600  # of each turn, from its middle: a document's first lines are often names and notices
MAX_CHARS = 3000
MIN_LETTERS = 24  # a few words could be of any language
SHARE = 0.2  # a Chinese text holds Latin names, an English one few Chinese: characters count like words
_HAN, _KANA, _HANGUL = (re.compile(f"[{r}]") for r in ("\u3400-\u9fff", "\u3040-\u30ff", "\uac00-\ud7af"))
_LETTERS = re.compile(r"[^\W\d_]")


def detect_language(turns: Sequence[Turn]) -> str:
    """Two-letter code of the language most of a row is in, `und` where nothing tells.

    Raises:
        LongftError: py3langid is missing.
    """
    return language_of_text("\n".join(_middle(turn.content) for turn in turns)[:MAX_CHARS])


def language_of_text(text: str) -> str:
    """Two-letter code of the language of a text, `und` where nothing tells."""
    letters = len(_LETTERS.findall(text))
    if letters == 0:
        return UNKNOWN
    if len(_HANGUL.findall(text)) > SHARE * letters:
        return "ko"
    han, kana = len(_HAN.findall(text)), len(_KANA.findall(text))
    if han + kana > SHARE * letters:
        return "ja" if kana > 0.1 * (han + kana) else "zh"
    if letters < MIN_LETTERS:
        return UNKNOWN
    with needs_extra("synth", "telling the language of rows that do not name it"):
        import py3langid
    code, _ = py3langid.classify(text)
    return str(code)


def _middle(text: str) -> str:
    start = max(0, (len(text) - SAMPLE_CHARS) // 2)
    return text[start : start + SAMPLE_CHARS]
