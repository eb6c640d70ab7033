"""Values of rows as text: one form for templates, for prompts of kind `fields` and for what stands inside a struct.

A text stands as it is. Numbers, dates, times and durations stand as Python's `str` writes them, which is exact:
`0.1`, `9.90`, `2026-01-02`, `2026-01-02 03:04:05`. Lists, structs and maps stand as JSON, in which all but numbers,
booleans and nulls are texts of the same form. Binary values are text in UTF-8.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from decimal import Decimal
from typing import Any
from uuid import UUID

from jinja2 import Undefined, UndefinedError

from batchllm_operators.stage.faults import invalid_row

_BYTES = (bytes, bytearray, memoryview)
_WRITTEN_BY_STR = (dt.date, dt.time, dt.timedelta, Decimal, UUID)
_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_LISTS = (list, tuple, range, KeysView, ValuesView, ItemsView)


class NullValueError(UndefinedError):
    """A template prints, or computes with, a null."""


class Null(Undefined):
    """A null in a template: may be tested and given a default, but not printed: nobody wants "None" in a prompt."""

    __slots__ = ()
    __str__ = __repr__ = __iter__ = __len__ = Undefined._fail_with_undefined_error

    def __init__(self, where: str) -> None:
        super().__init__(hint=f"{where} is null", exc=NullValueError)

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, Null)

    def __hash__(self) -> int:
        return hash(None)


class NotDataError(TypeError):
    """Something that is no value of a row: a function, a method, a generator, an object of a template's own."""

    def __init__(self, value: object) -> None:
        super().__init__(
            f"expected a value, got {type(value).__name__}, which is no data: a function or method needs its (), and a"
            " generator `| list` or `| join`"
        )


def value_text(value: Any) -> str:
    """The text of one value.

    Raises:
        NotDataError: it is no data.
        RowFaultError: bytes that are not UTF-8.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float, *_WRITTEN_BY_STR)):
        return str(value)
    if isinstance(value, Undefined):
        return str(value)  # raises: it is a null, or no such thing
    if value is None:
        raise NullValueError("a value within a column is null")
    text = json_value(value)
    return text if isinstance(text, str) else json_text(text)


def json_text(value: Any, indent: int | None = None) -> str:
    """The value as JSON, in the order of its keys; NaN and infinities, which JSON has not, are null.

    Raises:
        NotDataError: it is no data, or holds something that is none.
        RowFaultError: bytes that are not UTF-8.
    """
    if indent is None:
        return _compact(json_value(value))
    return json.dumps(json_value(value), ensure_ascii=False, indent=indent)


def json_value(value: Any) -> Any:
    """The value in the types of JSON: dict with text keys, list, str, int, float, bool, None.

    Raises:
        NotDataError: it is no data, or holds something that is none.
        RowFaultError: bytes that are not UTF-8.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {value_text(key): json_value(item) for key, item in value.items()}
    if isinstance(value, _LISTS):
        return [json_value(item) for item in value]
    if isinstance(value, _WRITTEN_BY_STR):
        return str(value)
    if isinstance(value, _BYTES):
        return decoded("value", value)
    if isinstance(value, Null):
        return None
    if isinstance(value, Undefined):
        str(value)  # raises, and says what is missing
    raise NotDataError(value)


def decoded(where: str, value: Any) -> Any:
    """The value with text in place of binary values, at any depth.

    Args:
        where: the column, for the message.
        value: of a row.

    Raises:
        RowFaultError: bytes that are not UTF-8; names the column and the byte.
    """
    if type(value) is str:
        return value
    if isinstance(value, _BYTES):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise invalid_row(
                f"{where}: expected text in UTF-8, got byte 0x{error.object[error.start]:02x} at position {error.start}"
            ) from error
    if isinstance(value, dict):
        return {decoded(where, key): decoded(f"{where}, field {key!r}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [decoded(f"{where}, item {place}", item) for place, item in enumerate(value)]
    return value
