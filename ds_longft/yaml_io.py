"""YAML as run configs mean it: no key twice, `off` is a word, lists of plain values on one line."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

# YAML 1.1 reads `wandb: off` as false, `1e-4` as text and `name: 2026-11-23` as a date; nobody who writes a config
# means that. The two patterns are YAML 1.2's.
_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(
    r"^([-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's idea of booleans and numbers, and repeated keys refused."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and kind are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice: the first value would be lost without a word."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = None if isinstance(key, Hashable) else "is a list or a section, expected a word"
            if problem or key in seen:
                problem = f"key {key!r} {problem or 'stands twice'}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Sections in blocks, lists of plain values on one line; quotes whatever either YAML would misread."""


for _reader in (_Loader, _Dumper):
    _reader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    _reader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.SequenceNode:
    plain = not any(isinstance(value, list | dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _represent_list)


def load_yaml(text: str) -> Any:
    """The content of one YAML document. Raises yaml.YAMLError, also for a repeated key."""
    return yaml.load(text, Loader=_Loader)


def dump_yaml(content: dict[str, Any]) -> str:
    """Readable YAML in the order of the keys; `load_yaml` gives an equal dict back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
