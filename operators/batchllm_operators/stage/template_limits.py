"""Limits of what a template may take for one row, so that no template takes a night or the machine's memory.

A template is the job's own, but it works on the values of rows, and what is a small loop for one row may be an endless
one for another. Jinja's sandbox guards attributes and not effort. Counted are turns of loops, calls, filters and
operators; the characters and items of every value that they make; and, as a last resort, seconds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

MOST_STEPS = 200_000
"""Turns of loops, calls, filters and operators."""
MOST_SIZE = 20_000_000
"""Characters of a text, or items of a list."""
MOST_MADE = 10 * MOST_SIZE
"""Characters and items of all values together, those that are thrown away included."""
MOST_WRITTEN = 2_000_000
"""Items of lists and mappings that are written as JSON."""
MOST_SECONDS = 10.0
MOST_BITS = 4_096
"""Bits of the largest integer."""

_STEPS_PER_LOOK = 64  # at the clock, which takes as long as a step

_PADDING = frozenset({"ljust", "rjust", "center", "zfill", "to_bytes"})
_NUMBERS = re.compile(r"\d+")


class TemplateLimitError(Exception):
    """A template takes more than a row may."""


class RenderLimits:
    """What one rendering has taken so far.

    Args:
        clock: seconds, increasing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """Begin to count for another row."""
        self._steps = self._made = self._written = 0
        self._end = self._clock() + MOST_SECONDS

    def step(self) -> None:
        """Count one turn, call, filter or operator.

        Raises:
            TemplateLimitError: it was one too many, or the time is over; of the other methods likewise.
        """
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise TemplateLimitError(f"it takes more than {MOST_STEPS:,} turns of loops, calls and operators")
        if not self._steps % _STEPS_PER_LOOK and self._clock() > self._end:
            raise TemplateLimitError(f"it takes more than {MOST_SECONDS:g} s")

    def size(self, size: int) -> None:
        """Count a value of so many characters or items, best before it is made."""
        self._made += size
        if size > MOST_SIZE or self._made > MOST_MADE:
            raise TemplateLimitError(
                f"it makes a value of more than {MOST_SIZE:,} characters, or {MOST_MADE:,} of all values together"
            )

    def made(self, value: Any) -> Any:
        """Count a value that is made already, and pass it on."""
        if isinstance(value, str | bytes | list | tuple):
            self.size(len(value))
        elif isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise TemplateLimitError(f"it makes an integer of more than {MOST_BITS:,} bits")
        return value

    def turns(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, each of them a step."""
        step = self.step
        for item in items:
            step()
            yield item

    def nested(self, value: Any) -> None:
        """Count what is in a list or mapping, as often as it is written: lists may hold one list many times."""
        if isinstance(value, Mapping | list | tuple):
            self._written += len(value)
            if self._written > MOST_WRITTEN:
                raise TemplateLimitError(f"it writes more than {MOST_WRITTEN:,} items of lists and mappings")
            for item in value.values() if isinstance(value, Mapping) else value:
                self.nested(item)

    def operator(self, operator: str, left: Any, right: Any) -> None:
        """Count what `left operator right` would make."""
        self.step()
        texts = [value for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "*" and texts and numbers:
            self.size(len(texts[0]) * max(numbers[0], 0))
        elif operator == "*" and len(numbers) == 2:
            self._bits(numbers[0].bit_length() + numbers[1].bit_length())
        elif operator == "**" and len(numbers) == 2:
            self._bits(numbers[0].bit_length() * max(numbers[1], 0))
        elif operator == "+":
            self.size(sum(map(len, texts)))
        elif operator == "%" and isinstance(left, str):
            self.formatted(left, right)

    def formatted(self, text: str, *values: Any) -> None:
        """Count what a format with widths would make."""
        widths = sum(int(number) if len(number) < 12 else MOST_SIZE + 1 for number in _NUMBERS.findall(text))
        given = sum(number for number in _integers(values) if number > MOST_SIZE // 100)
        self.size(len(text) + widths + (given if "*" in text or "{" in text else 0))

    def method(self, called: Any, values: tuple[Any, ...]) -> None:
        """Count what a method of a text, a list or a number would make."""
        self.step()
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            self.replaced(owner, *values[:2])
        elif isinstance(owner, str) and name == "join" and values:
            self.joined(owner, values[0])
        elif isinstance(owner, str) and name == "expandtabs" and values:
            self.size(owner.count("\t") * max(_integers(values), default=0))
        elif isinstance(owner, str | bytes | int):
            self.size(max(_integers(values), default=0) if name in _PADDING else 0)

    def replaced(self, text: str, old: Any = "", new: Any = "") -> None:
        """Count what replacing one text by another would make."""
        if isinstance(old, str) and isinstance(new, str):
            self.size(len(text) + text.count(old) * len(new))

    def joined(self, separator: str, items: Any) -> None:
        """Count what joining some texts would make."""
        if isinstance(items, list | tuple):
            self.size(sum(len(item) if isinstance(item, str) else 1 for item in items) + len(items) * len(separator))

    def _bits(self, bits: int) -> None:
        if bits > MOST_BITS:
            raise TemplateLimitError(f"it makes an integer of more than {MOST_BITS:,} bits")


def _integers(values: Iterable[Any]) -> list[int]:
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _integers(value)
        elif isinstance(value, Mapping):
            found += _integers(value.values())
    return found


class _Counted(NodeTransformer):
    """Lets loops and concatenations be counted, which Jinja compiles to plain Python."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        node.iter = _through("turns", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - Jinja's name
        self.generic_visit(node)
        return _through("made", node)


def count_effort(tree: nodes.Template) -> None:
    """Have the loops and concatenations of a template counted, by the methods `turns` and `made` of its environment."""
    _Counted().visit(tree)


def _through(method: str, node: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method, lineno=node.lineno)
    return nodes.Call(function, [node], [], None, None, lineno=node.lineno)
