"""The fields of a row as text, for prompts of kind `fields`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

from batchllm_operators.stage.faults import invalid_row
from batchllm_operators.stage.value_text import NotDataError, decoded, json_text, value_text

Field: TypeAlias = tuple[str, Any]
"""Name and value."""


def fields_text(form: Literal["json", "lines"], fields: Iterable[Field]) -> str:
    """The fields in the given order, as one JSON object or as `name: value` lines.

    Raises:
        RowFaultError: a value has no text (bytes that are not UTF-8); names the column.
    """
    if form == "json":
        return "{" + ", ".join(f"{_json(name, name)}: {_json(name, value)}" for name, value in fields) + "}"
    return "\n".join(f"{name}: {plain_text(name, value) or ''}".rstrip(" ") for name, value in fields)


def plain_text(name: str, value: Any) -> str | None:
    """A text as it is, any other value as a template would print it, but booleans as in JSON; None is None.

    Raises:
        RowFaultError: the value has no text; names the column.
    """
    if value is None or isinstance(value, str):
        return value
    return _json(name, value) if isinstance(value, bool) else _told(name, value, value_text)


def _json(name: str, value: Any) -> str:
    return _told(name, value, json_text)


def _told(name: str, value: Any, text_of: Callable[[Any], str]) -> str:
    try:
        return text_of(decoded(f"column {name!r}", value))
    except (NotDataError, RecursionError, ValueError) as error:  # ValueError: an integer of more than 4,300 digits
        raise invalid_row(
            f"column {name!r}: expected a value that JSON can write, got {type(value).__name__}: {error}"
        ) from error
