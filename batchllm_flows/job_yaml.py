"""YAML as job files are written: plain data, and no key twice in one mapping."""

from __future__ import annotations

from typing import Any

import yaml

_MERGE_TAG = "tag:yaml.org,2002:merge"


class RepeatedKeyError(ValueError):
    """A key stands twice in a mapping: the first of its values would be lost without a word."""


def load_yaml(text: str) -> Any:
    """The value of a YAML or JSON text.

    Raises:
        yaml.YAMLError: it is neither.
        RepeatedKeyError: a key stands twice in a mapping; names the key and both lines.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        # Before anything is made of the nodes, because PyYAML then copies merged keys into them.
        _refuse_repeated_keys(loader, node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_repeated_keys(loader: yaml.SafeLoader, node: yaml.Node, seen: set[int]) -> None:
    """Look through a node and those below it, each once however many aliases name it."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _refuse_repeated_keys(loader, one, seen)
        return
    lines: dict[Any, int] = {}
    for key_node, value_node in node.value:
        _refuse_repeated_keys(loader, value_node, seen)
        # Other keys than scalars cannot be keys of plain data, which PyYAML says with line and column.
        if key_node.tag == _MERGE_TAG or not isinstance(key_node, yaml.ScalarNode):
            continue
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        if key in lines:
            raise RepeatedKeyError(f"expected each key once, got {key!r} in line {lines[key]} and again in line {line}")
        lines[key] = line
