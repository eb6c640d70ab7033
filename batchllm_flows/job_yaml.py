"""YAML as job files are written: plain data, and no key twice in one mapping."""

from __future__ import annotations

from typing import Any

import yaml

_MERGE_TAG = "tag:yaml.org,2002:merge"


MOST_VALUES = 10_000
"""Values of a job file, those that aliases repeat counted each time."""
MOST_DEPTH = 32


class RepeatedKeyError(ValueError):
    """A key stands twice in a mapping: the first of its values would be lost without a word."""


class TooLargeError(ValueError):
    """The values, with all that aliases repeat, are no job: they would take all memory, or never end."""


def load_yaml(text: str) -> Any:
    """The value of a YAML or JSON text.

    Raises:
        yaml.YAMLError: it is neither.
        RepeatedKeyError: a key stands twice in a mapping; names the key and both lines.
        TooLargeError: it has too many values, or is nested too deeply.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = _composed(loader)
        if node is None:
            return None
        _refuse_too_large(node)
        # Before anything is made of the nodes, because PyYAML then copies merged keys into them.
        _refuse_repeated_keys(loader, node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _composed(loader: yaml.SafeLoader) -> yaml.Node | None:
    try:
        node: yaml.Node | None = loader.get_single_node()
    except RecursionError as error:
        raise TooLargeError(f"expected values within values at most {MOST_DEPTH} deep") from error
    return node


def _refuse_too_large(root: yaml.Node) -> None:
    """Count the values as they would be without aliases, until there are too many."""
    waiting, values = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        values += 1
        if depth > MOST_DEPTH:  # an alias within its own anchor gets there too
            line = node.start_mark.line + 1
            raise TooLargeError(f"expected values within values at most {MOST_DEPTH} deep, got more at line {line}")
        if values > MOST_VALUES:
            raise TooLargeError(f"expected at most {MOST_VALUES:,} values, those that aliases repeat included")
        if isinstance(node, yaml.SequenceNode):
            waiting += [(one, depth + 1) for one in node.value]
        elif isinstance(node, yaml.MappingNode):
            waiting += [(one, depth + 1) for pair in node.value for one in pair]


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
