"""`ds-longft docs [PAGE]`: the documentation that comes with the package."""

from __future__ import annotations

import difflib
import sys
import textwrap

from ds_longft.config.shipped import SHIPPED
from ds_longft.errors import ConfigError


def every_key() -> str:
    """The keys of docs/config.md as a help: their declarations would take the imports of pydantic and its settings."""
    lines = []
    for line in (SHIPPED / "docs" / "config.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            lines.append(f"\n{line.removeprefix('## ').replace('`', '')}")
        elif line.startswith("| `"):
            key, default, expected, _, meaning = line.strip("| ").split(" | ")
            about = f"{meaning} Expected: {expected}. (default: {default.strip('`') or 'none'})"
            lines += [
                f"  --{key.strip('`')}",
                textwrap.fill(about, 90, initial_indent=" " * 6, subsequent_indent=" " * 6),
            ]
    return "\n".join(lines)


def docs(page: str = "") -> None:
    """Print a page of the documentation, or list the pages.

    Args:
        page: its name, e.g. install, troubleshooting or config.
    """
    pages = {path.stem: path for path in sorted((SHIPPED / "docs").glob("*.md"))}
    if not page:
        for name, path in pages.items():
            title = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
            print(f"  {name:<16} {title.removeprefix('# ')}")
        return
    name = page.removeprefix("docs/").removesuffix(".md")
    if name not in pages:
        close = difflib.get_close_matches(name, pages, n=1)
        raise ConfigError(f"there is no page {page}: " + (f"did you mean {close[0]}?" if close else ", ".join(pages)))
    text = pages[name].read_text(encoding="utf-8")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        console = Console()
        with console.pager(styles=True):
            console.print(Markdown(text))
    else:
        print(text, end="")
