"""YAML as run configs mean it: no key twice, `off` is a word, `010` is ten, lists of plain values on one line."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_LEVELS = 32

# YAML 1.1 reads `wandb: off` as false, `1e-4` as text, `010` as 8, `1:30` as 90 and `name: 2026-11-23` as a date;
# nobody who writes a config means that. The patterns are YAML 1.2's.
_TAG = "tag:yaml.org,2002:"
_REPLACED = tuple(_TAG + name for name in ("bool", "int", "float", "timestamp"))
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?\d+$")
_FLOAT = re.compile(
    r"^([-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's idea of booleans and numbers; keys are words, and none stands twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and kind are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that stands twice: the first value would be lost without a word. `<<: *anchor` is no key yet."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("key is a list or a section, expected a word", key)
            if (key.tag, key.value) in seen:
                raise _problem(f"key {key.value!r} stands twice", key)
            seen.add((key.tag, key.value))
        return node


def _problem(text: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """A decimal number: PyYAML's own takes leading zeros for octal and colons for base 60."""
    if not _INT.match(node.value):
        raise _problem(f"{node.value!r} is no whole number", node)
    return int(node.value)


_Loader.add_constructor(_TAG + "int", _construct_int)


class _Dumper(yaml.SafeDumper):
    """Sections in blocks, lists of plain values on one line; quotes whatever either YAML would misread."""


for _reader in (_Loader, _Dumper):
    _reader.add_implicit_resolver(_TAG + "bool", _BOOL, list("tTfF"))
    _reader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
    _reader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    plain = not any(isinstance(value, list | dict) for value in values)
    return dumper.represent_sequence(_TAG + "seq", values, flow_style=plain)


_Dumper.add_representer(list, _represent_list)


def nested_too_deeply(content: Any) -> bool:
    """Whether lists and sections lie in each other deeper than any config, or in themselves (`&a [*a]`)."""
    level = [content]
    for _ in range(MOST_LEVELS):
        below = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = list({id(value): value for values in below for value in values}.values())
    return bool(level)


def load_yaml(text: str) -> Any:
    """The content of one YAML document. Raises yaml.YAMLError, also for a repeated key."""
    try:
        content = yaml.load(text, Loader=_Loader)
        too_deep = nested_too_deeply(content)
    except RecursionError:
        too_deep = True
    except (ValueError, OverflowError) as error:  # of a value with a tag of its own, e.g. !!float abc
        raise yaml.YAMLError(str(error)) from None
    if too_deep:
        raise yaml.YAMLError("sections or lists are nested too deeply")
    return content


def dump_yaml(content: dict[str, Any]) -> str:
    """Readable YAML in the order of the keys; `load_yaml` gives an equal dict back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
