"""Modules stay small, and classes hold few things, so that each can be read at one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_imports_of_rooms import modules

MOST_LINES = 400
MOST_ATTRIBUTES = 12

_TENSORS = "tensors that keep their addresses for captured CUDA graphs, and are read by name in kernels' launches"
LARGER_CLASSES = {
    "batchllm_kernels.attention.flash_shared.FlashShared": _TENSORS,
    "batchllm_kernels.attention.plan_buffers.PlanBuffers": _TENSORS,
    "batchllm_kernels.attention.launch.PreparedLaunches": "three kernels with a grid and numbers each, made once",
}
"""Classes with more attributes, each with the reason. Records and dataclasses are data, and do not count."""


def attributes(source: str) -> Iterator[tuple[str, int]]:
    """The classes of a module, each with the number of attributes that its methods set."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            targets = [target for method in methods for target in ast.walk(method) if isinstance(target, ast.Attribute)]
            names = {
                one.attr
                for one in targets
                if isinstance(one.ctx, ast.Store) and isinstance(one.value, ast.Name) and one.value.id == "self"
            }
            yield node.name, len(names)


MOST_LINES_OF_AN_EXTENSION = 60
EXTENSIONS = ("formats/tabbed.py", "tasks/last_state.py", "execute/pipe_backend.py")
"""What the tests add from outside, for others to begin from: a file format, a task, an engine backend."""


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: path.read_text() for name, path in modules().items()}


def test_no_module_is_longer_than_can_be_read(sources: dict[str, str]) -> None:
    lines = {name: len(source.splitlines()) for name, source in sources.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_class_holds_too_much(sources: dict[str, str]) -> None:
    counts = {f"{module}.{name}": count for module, source in sources.items() for name, count in attributes(source)}
    assert len(counts) > 300
    too_many = {name: count for name, count in counts.items() if count > MOST_ATTRIBUTES}
    assert {name: count for name, count in too_many.items() if name not in LARGER_CLASSES} == {}
    assert set(LARGER_CLASSES) <= set(too_many), "a class that is small again needs no reason"


def test_an_attribute_of_a_class_would_be_counted(tmp_path: Path) -> None:
    source = """
class One:
    def __init__(self):
        self.a = self.b = 1
        self.c, self.d = 1, 2
        self.a += 1

    def later(self):
        self.e = 1
"""
    assert list(attributes(source)) == [("One", 5)]


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_what_is_added_from_outside_is_short(extension: str) -> None:
    lines = [line for line in (Path(__file__).parent / extension).read_text().splitlines() if line.strip()]
    assert len(lines) < MOST_LINES_OF_AN_EXTENSION
