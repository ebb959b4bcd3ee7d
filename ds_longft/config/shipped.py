"""Files that come with the package, found from a clone and from an installed wheel alike: recipes, DeepSpeed JSONs."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PACKAGE = Path(str(files("ds_longft")))
SHIPPED = PACKAGE / "shipped"  # in a clone links to recipes/, ds_configs/, launch/ and docs/, in a wheel their files
TEMPLATES = PACKAGE / "data/templates"  # chat templates


def find_file(path: str | Path) -> Path:
    """`path` itself where it exists, else the shipped file of that name, e.g. recipes/quickstart.yaml; else `path`."""
    given = Path(path).expanduser()
    return next((place for place in (given, SHIPPED / given) if place.exists()), given)


def find_template(path: str) -> Path:
    """The Jinja file at `path`, else the shipped one of that name, e.g. qwen3_thinking.jinja; else `path`."""
    given = Path(path).expanduser()
    return next((place for place in (given, TEMPLATES / path) if place.is_file()), given)
