"""What is said about a wrong value of the run config: what was seen, what was expected, which key to change."""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

from ds_longft.config.data_keys import SourceConfig
from ds_longft.config.other_trainers import nearest
from ds_longft.config.run_config import RunConfig
from ds_longft.config.section import OnResume, parse_tokens

_NO_VALUE = object()
_BOUNDS = {Gt: ("gt", "above"), Ge: ("ge", "at least"), Lt: ("lt", "below"), Le: ("le", "at most")}
_PLAIN = {
    dict[str, str]: "names, each with another: {theirs: ours}",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}


def all_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key in the order of declaration, sections included: `ds_config`, ..., `model`, `model.path`, ..."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for below in _models_of(field.annotation):
            keys += all_keys(below, f"{prefix}{name}.")
    return keys


def keys_on_resume(section: BaseModel, kinds: set[OnResume], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value (as JSON has it) of every key declared as one of `kinds`; of a section that is null, none."""
    values = section.model_dump(mode="json")
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        below = getattr(section, name)
        if isinstance(below, BaseModel):
            found |= keys_on_resume(below, kinds, f"{prefix}{name}.")
        elif kinds & set(on_resume(field)):
            found[prefix + name] = values[name]
    return found


def on_resume(field: FieldInfo) -> list[OnResume]:
    """What a resume does about another value of the key: one answer, or for a section of keys none."""
    return [mark for mark in field.metadata if isinstance(mark, OnResume)]


def expectation(key: str) -> str:
    """What the value of a dotted key has to be, in words. Raises KeyError for an unknown key."""
    _, annotation, metadata = _locate(tuple(key.split(".")))
    return describe(annotation, metadata)


def keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    """The keys known in the section where this place lies, e.g. `data.train[1].path` beside `data.train[1].pth`."""
    path, annotation, _ = _locate(loc[:-1])
    return [dotted((*path, name)) for model in _models_of(annotation) for name in model.model_fields]


def dotted(path: tuple[int | str, ...]) -> str:
    """`("data", "train", 1, "path")` -> `data.train[1].path`."""
    return re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, path)))


def validation_problems(error: ValidationError, content: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> text for each wrong key of the content; unknown ones are `other_trainers.unknown_key`'s."""
    problems: dict[str, str] = {}
    for detail in error.errors():
        if detail["type"] == "extra_forbidden":
            continue
        path, annotation, metadata = _locate(detail["loc"])
        seen = _look_up(content, path)
        key = dotted(path)
        words = "missing" if seen is _NO_VALUE else f"seen {_short(seen)}"
        meant = nearest(seen, _choices(annotation)) if isinstance(seen, str) else ""
        problems.setdefault(key, f"{key}: {words}, expected {describe(annotation, metadata)}{meant}")
    return problems


def _locate(loc: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any, list[Any]]:
    """The part of a pydantic location that names a key, with its annotation and bounds.

    Behind the key pydantic appends which branch of a union it tried, or a place in a tuple: of no use to a reader.
    """
    annotation: Any = RunConfig
    metadata: list[Any] = []
    path: tuple[int | str, ...] = ()
    for part in loc:
        models = _models_of(annotation)
        if isinstance(part, int) and get_origin(annotation) is list:
            annotation, metadata = get_args(annotation)[0], []
        elif models and part in models[0].model_fields:
            field = models[0].model_fields[str(part)]
            annotation, metadata = field.annotation, field.metadata
        else:
            break
        path += (part,)
    return path, annotation, metadata


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    """The section an annotation stands for, also behind `| None`; lists of sections are not looked into."""
    branches = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return [branch for branch in branches if isinstance(branch, type) and issubclass(branch, BaseModel)]


def _look_up(content: Any, path: tuple[int | str, ...]) -> Any:
    """The value at that place, or `_NO_VALUE`."""
    for part in path:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return _NO_VALUE
    return content


def describe(annotation: Any, metadata: list[Any]) -> str:
    """An annotation and its bounds in words: `a whole number above 0 or null`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        # A nested Field(...) carries its bounds in a list of its own.
        return describe(inner, [*metadata, *(m for x in more for m in getattr(x, "metadata", [x]))])
    if any(isinstance(m, BeforeValidator) and m.func is parse_tokens for m in metadata):
        return "a token count such as 131072 or 128K"
    if origin in (Union, UnionType):
        return " or ".join(
            describe(branch, metadata if branch is not NoneType else []) for branch in get_args(annotation)
        )
    if origin is Literal:
        return _listed(_choices(annotation))
    if origin is list:
        return f"a list of: {describe(get_args(annotation)[0], [])}"
    if origin is tuple:
        return f"a list of {len(get_args(annotation))}: {describe(get_args(annotation)[0], [])}"
    if models := _models_of(annotation):
        bare = "a path or " if models[0] is SourceConfig else ""
        return f"{bare}a section (keys {', '.join(models[0].model_fields)})"
    bounds = [
        f" {word} {getattr(m, name)}" for m in metadata for kind, (name, word) in _BOUNDS.items() if isinstance(m, kind)
    ]
    return _PLAIN[annotation] + " and".join(bounds)


def _choices(annotation: Any) -> list[str]:
    """The words a Literal allows, also inside a union."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for branch in get_args(annotation) for choice in _choices(branch)]


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _short(value: Any, limit: int = 80) -> str:
    """A value as the user wrote it, cut where it is long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
