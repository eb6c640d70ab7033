"""YAML as job files are written: plain data, and no key twice in one mapping."""

from __future__ import annotations

from typing import Any

import yaml


class _JobLoader(yaml.SafeLoader):
    """A safe loader that refuses a key that stands twice: the first of its values would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"expected each key once, got {key!r} in line {seen[key]} and again in line {line}"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The value of a YAML or JSON text.

    Raises:
        yaml.YAMLError: it is neither, or a key stands twice in a mapping.
    """
    return yaml.load(text, Loader=_JobLoader)  # noqa: S506 - a safe loader
