"""Numbers, names and texts as a person reads them, in a log, in Markdown, and in keys of artifacts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

# What Markdown would take for marks; an underscore between letters or digits is none.
_MARKS = re.compile(r"[\\`*\[\]<>|~&#$]|(?<![^\W_])_|_(?![^\W_])")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 row`, `3,201 rows`.

    Args:
        number: how many.
        noun: the name of one.
        plural: the name of many, where it is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def size_text(size: int) -> str:
    """Bytes in two or three digits and decimal units: `1 byte`, `350 MB`, `1.2 GB`."""
    if size < 1000:
        return counted(size, "byte")
    number, units = size / 1000, iter(("kB", "MB", "GB", "TB"))
    unit = next(units)
    # Already from 999.5 it would be rounded to four digits.
    while number >= 999.5 and (larger := next(units, None)) is not None:
        number, unit = number / 1000, larger
    digits = f"{number:.1f}".removesuffix(".0") if number < 9.95 else f"{number:,.0f}"
    return f"{digits} {unit}"


def first_of(names: Sequence[str], number: int | None = None, *, most: int = 5) -> str:
    """The first of some names, and how many more there are: `a, b and 3 more`.

    Args:
        names: all of them, or the first.
        number: how many there are; default: as many as names.
        most: names to be shown.
    """
    shown = names[:most]
    more = (len(names) if number is None else number) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def markdown_text(text: str) -> str:
    """A text that is no Markdown, on one line of Markdown: its marks are escaped, its line breaks are spaces."""
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def markdown_code(text: str) -> str:
    """A name as code in Markdown, also within a table: in fences longer than its own, its bars escaped."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}".replace("|", r"\|")


def artifact_slug(name: str) -> str:
    """The name in the characters Prefect allows in artifact keys: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "batch-inference"


def did_you_mean(name: str, known: Collection[str], otherwise: str) -> str:
    """A hint for a name that nobody knows: the nearest one that is known, else another hint."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else otherwise


def fault_text(message: str) -> str:
    """The message of a fault that pydantic has found, without what it puts before the messages of our own checks."""
    return message.removeprefix("Value error, ")
