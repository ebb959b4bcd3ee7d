"""torch out of the way of commands that need a tokenizer or a config alone.

transformers imports torch wherever it is installed, which takes most of the time of a command that looks at ten rows.
"""

from __future__ import annotations

import os
import sys


def hide_torch() -> None:
    """transformers will read tokenizers and configs without torch, and an import of torch fails.

    For a process that is one command's. Where torch is imported already nothing changes.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # as Python documents it: not to be found
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch


def show_torch() -> None:
    """Undo `hide_torch`, before transformers is imported."""
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]  # None too, after `hide_torch`
    if modules.get("torch", modules) is None:
        del modules["torch"]
