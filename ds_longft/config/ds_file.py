"""The DeepSpeed JSON as it is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ds_longft.config.shipped import find_file
from ds_longft.config.yaml_io import nested_too_deeply
from ds_longft.errors import ConfigError


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """The DeepSpeed JSON as written. Raises ConfigError: no such file, bad JSON (with its line), a key given twice.

    A relative path that does not exist here is looked for among the shipped files.
    """

    def whole(digits: str) -> int | float:  # one that no counter holds is infinite, which is refused where it stands
        return int(digits) if len(digits) < 20 else math.inf

    try:
        text = find_file(path).read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_unique, parse_int=whole)
        too_deep = nested_too_deeply(content)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"ds_config: {path} is not valid JSON: {where}: {error.msg}") from None
    except _RepeatedKeyError as error:
        raise ConfigError(f"ds_config: {path} has the key {error} twice in one section") from None
    except RecursionError:
        too_deep = True
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"ds_config: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if too_deep:
        raise ConfigError(f"ds_config: {path}: sections or lists are nested too deeply")
    if not isinstance(content, dict):
        raise ConfigError(f"ds_config: {path} holds a {type(content).__name__} at its top, expected an object {{...}}")
    return content


def stage_asked(path: str | Path) -> str:
    """The ZeRO stage that a JSON asks for, in words. A run may lower it: weights that fit stay whole."""
    stage = load_ds_config(path).get("zero_optimization", {}).get("stage", 0)
    return f"ZeRO {stage} asked ({Path(path).name})"


class _RepeatedKeyError(Exception):
    """A JSON object holds a key twice; Python's reader would silently keep the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise _RepeatedKeyError(key)
        content[key] = value
    return content
