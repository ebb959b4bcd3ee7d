"""A document's parts with near neighbours between them: what belongs together lies far apart, among what is like it.

A part is followed by the parts of other documents that are most like it; the next part of the document comes behind
them. To tell how the document goes on a model has to look past all that. Source: NExtLong, arXiv 2501.12766.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from ds_longft.errors import DataError
from ds_longft.tools.make_data.lengths import Lengths
from ds_longft.tools.make_data.synth.refgpt8x import Embed, nearest
from ds_longft.tools.make_data.synth.row_plan import Wanted
from ds_longft.tools.make_data.synth.sources import Document

PART_TOKENS = 2048
PARTS = 4  # of a row, at least


def negative_rows(
    documents: Sequence[Document],
    wanted: Wanted,
    *,
    part_tokens: int,
    separator: str = "\n\n",
    embed: Embed | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows in `text` form.

    Args:
        documents: what is cut into parts; neighbours are of one language. Those of less than two parts are neighbours.
        wanted: how many documents are drawn, none twice; how long rows are.
        part_tokens: of a part; `PARTS` of them fit a row.
        separator: between parts.
        embed: texts to vectors; TF-IDF when left out.

    Raises:
        DataError: fewer documents of two parts than rows, or a language with too few parts.
        LongftError: scikit-learn is missing.
    """
    rows, lengths = wanted.rows, wanted.lengths
    cut = [_parts(document.text, part_tokens, lengths) for document in documents]
    long = [i for i, parts in enumerate(cut) if len(parts) > 1]
    if rows > len(long):
        raise DataError(
            f"{rows} rows were asked for, and {len(long)} documents are longer than two parts of {part_tokens:,} tokens"
        )
    rng = random.Random(f"negatives {wanted.seed}")
    drawn = rng.sample(long, rows)
    in_row = wanted.context_tokens // part_tokens
    for language in sorted({documents[i].language for i in drawn}):
        place = [(i, n) for i, d in enumerate(documents) if d.language == language for n in range(len(cut[i]))]
        texts, at = [cut[i][n] for i, n in place], {both: number for number, both in enumerate(place)}
        of_row: dict[int, range] = {}  # document -> which of its parts
        for i in (i for i in drawn if documents[i].language == language):
            own = min(len(cut[i]), max(2, in_row // 2))
            first = rng.randrange(len(cut[i]) - own + 1)
            of_row[i] = range(first, first + own)
        asked = [at[i, n] for i, parts in of_row.items() for n in parts]
        near = iter(nearest(texts, asked, in_row + max(len(cut[i]) for i in of_row), embed).tolist())
        for i, parts in of_row.items():
            taken: set[int] = set()
            behind = []  # each part, its neighbours
            for number, others in zip(range(len(parts)), near, strict=False):
                count = in_row // len(parts) - 1 + (number < in_row % len(parts))
                free = [k for k in others if place[k][0] != i and k not in taken][:count]
                taken |= set(free)
                behind.append([texts[k] for k in free])
            if not taken:
                raise DataError(f"{language}: no part of another document is left to stand between those of one")
            text = _fitting([cut[i][n] for n in parts], behind, separator, wanted)
            yield {"text": text, **wanted.identity(documents[i].id, language), "parts": len(parts)}


def _parts(text: str, tokens: int, lengths: Lengths) -> list[str]:
    """Parts of about N tokens, up to the end of a line where there is one in the last quarter; no short rest."""
    starts, parts, begin = lengths.starts(text), list[str](), 0
    for at in range(tokens, len(starts), tokens):
        end = int(starts[at])
        line = text.rfind("\n", begin + 3 * (end - begin) // 4, end) + 1
        end = line or end
        parts.append(text[begin:end].strip())
        begin = end
    rest = text[begin:].strip()
    return [part for part in (*parts, *([rest] if not parts or len(rest) > len(parts[0]) // 2 else [])) if part]


def _fitting(own: Sequence[str], behind: Sequence[list[str]], separator: str, wanted: Wanted) -> str:
    """Each part with its neighbours behind it; the farthest neighbours of the fullest part go until the row fits."""
    while True:
        made = separator.join(text for part, others in zip(own, behind, strict=True) for text in (part, *others))
        if wanted.lengths.plain(made) <= wanted.context_tokens or not any(behind):
            return made
        max(reversed(behind), key=len).pop()
