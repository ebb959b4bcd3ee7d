"""Called by mkdocs for each page."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ lead to files of the repository, which the site does not have: there they are named."""
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)#]*)[^)]*\)", r"\1 (`\2`)", markdown)
