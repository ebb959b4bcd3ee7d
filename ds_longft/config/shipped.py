"""Files that come with the package, found from a clone and from an installed wheel alike: DeepSpeed JSONs, recipes."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
CLONE = PACKAGE.parent
TEMPLATES = PACKAGE / "data/templates"  # chat templates


def find_file(path: str | Path) -> Path:
    """`path` itself where it exists, else the shipped file of that name, e.g. recipes/quickstart.yaml; else `path`.

    Shipped files lie beside the package in a clone, in share/ds_longft of the environment otherwise.
    """
    given = Path(path).expanduser()
    places = [given, CLONE / given, Path(sys.prefix) / "share/ds_longft" / given]
    return next((place for place in places if place.exists()), given)


def find_template(path: str) -> Path:
    """The Jinja file at `path`, else the shipped one of that name, e.g. qwen3_thinking.jinja; else `path`."""
    given = Path(path).expanduser()
    return next((place for place in (given, TEMPLATES / path) if place.is_file()), given)
