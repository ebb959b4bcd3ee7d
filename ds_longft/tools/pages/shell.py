"""The shell of a page: one HTML file with everything in it, and its tables. No network, no fonts, no other file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

REFRESH_S = 30
ICON = (  # three bars, 16 x 16
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAgMAAABinRfyAAAADFBMVEX///8FUK6oQAAAAABdFdc9AAAAAXRSTl"
    "MAQObYZgAAACNJREFUeNpjYIABRgYGxmAmBgYGBgyCawG6GItWAhZ1DAwMAEJ9AaZ+YFicAAAAAElFTkSuQmCC"
)
Pairs = Iterable[tuple[str, str]]
"""Names and values."""


def shell(
    name: str, status: str, good: str, sections: Sequence[tuple[str, str]], *, error: str = "", refresh: bool = False
) -> str:
    """A page of sections (title, HTML), those without content left out."""
    shown = [(f"s{i}", title, body) for i, (title, body) in enumerate(sections) if body]
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in shown)
    bodies = "".join(f'<section><h2 id="{key}">{escape(title)}</h2>{body}</section>' for key, title, body in shown)
    again = f'<meta http-equiv="refresh" content="{REFRESH_S}">' if refresh else ""
    first = shown[0][0] if shown else ""
    style, script = (
        files("ds_longft.tools.pages").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{again}<link rel="icon" href="{ICON}"><title>{escape(name)}: {escape(status)}</title>'
        f"<style>{style}</style></head><body>"
        f'<a class="skip" href="#{first}">Skip to the content</a>'
        f"<header><h1>{escape(name)}</h1>"
        f'<p class="status {good}">{escape(status)}</p>{error}</header>'
        f"<nav aria-label=Sections>{links}</nav><main>{bodies}</main><script>{script}</script></body></html>\n"
    )


def tiles(pairs: Pairs) -> str:
    """The few numbers that are read first, each with its unit in smaller letters."""
    shown = []
    for name, value in pairs:
        split = re.fullmatch(r"(\d(?:[\d.,]*\d)?(?: → \d(?:[\d.,]*\d)?)?) (.*)", value)
        told = f"<b>{escape(split[1])}</b> <small>{escape(split[2])}</small>" if split else f"<b>{escape(value)}</b>"
        shown.append(f"<div class=tile><span>{escape(name)}</span>{told}</div>")
    return f"<div class=tiles>{''.join(shown)}</div>"


def facts_table(pairs: Pairs) -> str:
    """Facts that are words rather than numbers."""
    rows = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f"<table class=facts>{rows}</table>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Rows of words and numbers; the first of each row names it."""
    head = "<td></td>" + "".join(f"<th scope=col>{escape(c)}</th>" for c in columns[1:])
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>" + "".join(f"<td class=num>{escape(c)}</td>" for c in cells) + "</tr>"
        for name, *cells in rows
    )
    return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def words_table(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """The same of cells that are words: they wrap, so that five columns fit a screen and two a phone."""
    return f"<div class=words>{wide(table(columns, rows, caption), caption)}</div>"


def commands(lines: Iterable[str]) -> str:
    """What a shell takes, with a button that copies it."""
    return f"<pre class=copy>{escape(chr(10).join(lines))}</pre>"


def wide(content: str, name: str) -> str:
    """What may be wider than the window: it scrolls inside its own box, which the keyboard reaches too."""
    return f'<div class=wide role=region tabindex=0 aria-label="{escape(name)}">{content}</div>'


def details(title: str, body: str, *, opened: bool = False) -> str:
    """What is folded away until it is asked for."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"
