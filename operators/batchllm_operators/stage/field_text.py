"""The fields of a row as text, for prompts of kind `fields`."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Literal, TypeAlias

import orjson

from batchllm_operators.stage.faults import invalid_row

Field: TypeAlias = tuple[str, Any]
"""Name and value."""


def fields_text(form: Literal["json", "lines"], fields: Iterable[Field]) -> str:
    """The fields in the given order, as one JSON object or as `name: value` lines.

    Raises:
        RowFaultError: JSON has nothing for a value (bytes); names the column.
    """
    if form == "json":
        return "{" + ", ".join(f"{_json('', name)}: {_json(name, value)}" for name, value in fields) + "}"
    return "\n".join(f"{name}: {plain_text(name, value) or ''}".rstrip(" ") for name, value in fields)


def plain_text(name: str, value: Any) -> str | None:
    """A text as it is, any other value as JSON; None is None.

    Raises:
        RowFaultError: JSON has nothing for the value; names the column.
    """
    return value if value is None or isinstance(value, str) else _json(name, value)


def _json(name: str, value: Any) -> str:
    try:
        return orjson.dumps(value, default=_exact_decimal, option=orjson.OPT_NON_STR_KEYS).decode()
    except orjson.JSONEncodeError as error:
        raise invalid_row(
            f"column {name!r}: expected a value that JSON can write, got {type(value).__name__}: {error}"
        ) from error


def _exact_decimal(value: object) -> str:
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
