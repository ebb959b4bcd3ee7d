"""What is trained of a text, in green or in [[ ]]; long stretches of the rest by their ends."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text


def coloured(parts: Iterable[tuple[str, float]], max_chars: int, *, marked: bool = False) -> Text:
    """(text, weight) pieces in a row; those without weight are cut where they are longer than `max_chars`.

    `marked`: brackets too, where no colour is seen.
    """
    text = Text()
    for piece, weight in parts:
        if weight:
            text.append(f"[[{piece}]]" if marked else piece, style="bold green")
        elif len(piece) > max_chars:
            half = max_chars // 2
            text.append(piece[:half]).append(f" [... {len(piece) - 2 * half:,} characters ...] ", style="dim")
            text.append(piece[-half:] if half else "")
        else:
            text.append(piece)
    return text
