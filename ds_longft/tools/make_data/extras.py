"""Libraries that only some commands need: installed as extras, and named when missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ds_longft.errors import LongftError


@contextmanager
def needs_extra(extra: str, what_for: str) -> Iterator[None]:
    """Around an import: a missing library becomes a `LongftError` that says which extra to install."""
    try:
        yield
    except ImportError as error:
        raise LongftError(
            f"{what_for} needs {error.name}: pip install 'ds-longft[{extra}]' (in a clone: pip install -e '.[{extra}]')"
        ) from error
