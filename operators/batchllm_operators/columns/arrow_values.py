"""Values of Arrow columns as Python values: for templates, and for JSON.

Arrow holds values that Python has not (nanoseconds, years beyond 9999, time zones that this machine does not know, text
that is no UTF-8): its own conversion ends in an exception that names no row. Here each such value becomes a text that
says the same, or, where there is none, a mark in its place, so that one row is at fault and not the job.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias
from uuid import UUID

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

Leaf: TypeAlias = Callable[[pa.Array], list[Any]]

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_SECONDS_A_DAY = 86_400
_CONVERSION_ERRORS = (ValueError, OverflowError, pa.ArrowException)
_OUT_OF_RANGE = "<"  # how Arrow's text of a time begins when it has none


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands where a value has no Python counterpart, and says why."""

    reason: str


def python_rows(table: pa.Table) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The rows as column name -> value for templates, and why some could not be read.

    Times are `datetime` values, or texts where they have more digits or a later year than those; binary values are
    text in UTF-8; maps are dicts; a struct with a field twice is a list of (name, value).

    Returns:
        The rows, and row offset -> reason, for rows with a text that is no UTF-8.
    """
    columns = [(name, _python_values(table[name])) for name in table.column_names]
    faults: dict[int, str] = {}
    for name, (values, complete) in columns:
        for offset, value in enumerate([] if complete else values):
            fault = _unreadable(value)
            if fault is not None:
                faults.setdefault(offset, f"column {name!r}: {fault.reason}")
    names = table.column_names
    rows = zip(*(values for _, (values, _) in columns), strict=True) if columns else [()] * len(table)
    return [dict(zip(names, row, strict=True)) for row in rows], faults


def json_values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of a column as JSON has them.

    Times are texts in ISO 8601 (with a blank between day and time; UTC, with a Z, where the column has a time zone),
    durations such as `PT1.5S`; decimals are texts that keep all digits; NaN and infinities are the texts `NaN`,
    `Infinity` and `-Infinity`; binary values are base64; maps are objects, their keys as text; a struct with a field
    twice is a list of [name, value]. Bytes of a text that are no UTF-8 become U+FFFD.
    """
    return [value for chunk in _chunks(column) for value in _values(chunk, _json_leaf)]


def _python_values(column: pa.ChunkedArray) -> tuple[list[Any], bool]:
    """Values, and whether all of them could be read."""
    complete = True

    def leaf(array: pa.Array) -> list[Any]:
        nonlocal complete
        values = _python_leaf(array)
        complete = complete and not any(type(value) is Unreadable for value in values)
        return values

    return [value for chunk in _chunks(column) for value in _values(chunk, leaf)], complete


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]


def _values(array: pa.Array, leaf: Leaf) -> list[Any]:
    """The values of an array of any type; those of types without children are what `leaf` makes of them."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _extension_values(array, leaf)
    if pa.types.is_dictionary(kind):
        return _values(array.dictionary_decode(), leaf)
    if pa.types.is_run_end_encoded(kind):
        return _values(pc.run_end_decode(array), leaf)
    if pa.types.is_struct(kind):
        rows = _struct_values(array, leaf)
    elif pa.types.is_map(kind):
        rows = _map_values(array, leaf)
    elif isinstance(kind, pa.FixedSizeListType):
        size, first = kind.list_size, array.offset * kind.list_size
        items = _values(array.values.slice(first, len(array) * size), leaf)
        rows = [items[place * size : (place + 1) * size] for place in range(len(array))]
    elif isinstance(kind, pa.ListType | pa.LargeListType):
        offsets = array.offsets.to_numpy().tolist()
        first = offsets[0]
        items = _values(array.values.slice(first, offsets[-1] - first), leaf)
        rows = [items[start - first : end - first] for start, end in pairwise(offsets)]
    elif isinstance(kind, pa.ListViewType | pa.LargeListViewType):
        items = _values(array.values, leaf)
        places = zip(array.offsets.to_numpy().tolist(), array.sizes.to_numpy().tolist(), strict=True)
        rows = [items[start : start + size] for start, size in places]
    else:
        return leaf(array)
    if array.null_count:
        return [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    return rows


def _extension_values(array: pa.ExtensionArray, leaf: Leaf) -> list[Any]:
    values = _values(array.storage, _plain_leaf if array.type.extension_name == "arrow.uuid" else leaf)
    if array.type.extension_name == "arrow.uuid":
        return [None if value is None else str(UUID(bytes=value)) for value in values]
    if array.type.extension_name == "arrow.bool8":
        return [None if value is None else bool(value) for value in values]
    return values


def _struct_values(array: pa.StructArray, leaf: Leaf) -> list[Any]:
    names = [field.name for field in array.type]
    if not names:
        return [{} for _ in range(len(array))]
    rows = zip(*(_values(array.field(place), leaf) for place in range(len(names))), strict=True)
    if len(set(names)) < len(names):
        return [[list(pair) for pair in zip(names, row, strict=True)] for row in rows]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _map_values(array: pa.MapArray, leaf: Leaf) -> list[Any]:
    offsets = array.offsets.to_numpy().tolist()
    first, size = offsets[0], offsets[-1] - offsets[0]
    as_key = _json_key if leaf is _json_leaf else _python_key
    keys = [as_key(key) for key in _values(array.keys.slice(first, size), leaf)]
    items = _values(array.items.slice(first, size), leaf)
    return [
        dict(zip(keys[start - first : end - first], items[start - first : end - first], strict=True))
        for start, end in pairwise(offsets)
    ]


def _python_key(key: Any) -> Any:
    return key if isinstance(key, Hashable) else _json_key(key)


def _json_key(key: Any) -> str:
    return key if isinstance(key, str) else orjson.dumps(key, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def _plain_leaf(array: pa.Array) -> list[Any]:
    kind = array.type
    if (pa.types.is_integer(kind) or pa.types.is_float32(kind) or pa.types.is_float64(kind)) and not array.null_count:
        return list(array.to_numpy(zero_copy_only=False).tolist())
    return list(array.to_pylist())


def _python_leaf(array: pa.Array) -> list[Any]:
    kind = array.type
    if _is_text(kind) or _is_binary(kind):
        return [_decoded(value) for value in _bytes_or_texts(array)]
    if not pa.types.is_temporal(kind):
        return _plain_leaf(array)
    if pa.types.is_timestamp(kind) and kind.tz is not None and not _knows_zone(kind.tz):
        array = array.cast(pa.timestamp(kind.unit, "UTC"))
    try:
        return _plain_leaf(array)
    except _CONVERSION_ERRORS:
        texts = _time_texts(array)
        return [_time_or_text(scalar, text) for scalar, text in zip(array, texts, strict=True)]


def _json_leaf(array: pa.Array) -> list[Any]:
    kind = array.type
    if _is_text(kind):
        return [
            value if value is None or isinstance(value, str) else value.decode(errors="replace")
            for value in _bytes_or_texts(array)
        ]
    if _is_binary(kind):
        return [None if value is None else base64.b64encode(value).decode() for value in array.to_pylist()]
    if pa.types.is_temporal(kind):
        return _time_texts(array)
    if pa.types.is_decimal(kind):
        return [None if value is None else format(value, "f") for value in array.to_pylist()]
    values = _plain_leaf(array)
    if pa.types.is_floating(kind) and not pc.all(pc.is_finite(array)).as_py():
        return [_json_float(value) for value in values]
    return values


def _json_float(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _bytes_or_texts(array: pa.Array) -> list[Any]:
    """Texts where all of them are UTF-8; else the bytes of each."""
    try:
        values: list[Any] = array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(pa.large_binary()).to_pylist()
    return values


def _decoded(value: bytes | str | None) -> str | Unreadable | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return Unreadable(f"expected text in UTF-8, got byte {value[error.start]:#04x} at position {error.start}")


def _unreadable(value: Any) -> Unreadable | None:
    """The mark that stands in a value, at any depth."""
    if isinstance(value, Unreadable):
        return value
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list):
        inner = value
    return next((found for item in inner if (found := _unreadable(item)) is not None), None)


def _knows_zone(name: str) -> bool:
    try:
        pa.lib.string_to_tzinfo(name)
    except (KeyError, ValueError, pa.ArrowException):  # zoneinfo's and pytz's errors for unknown names are KeyErrors
        return False
    return True


def _time_or_text(scalar: pa.Scalar, text: str | None) -> Any:
    try:
        return scalar.as_py()
    except _CONVERSION_ERRORS:
        return text


def _time_texts(array: pa.Array) -> list[str | None]:
    """Times and durations as text, whatever their digits, years and time zones; a time with a zone in UTC."""
    kind = array.type
    if pa.types.is_duration(kind):
        return [None if value is None else _duration_text(value, kind.unit) for value in _integers(array)]
    if pa.types.is_timestamp(kind):
        array = array.cast(pa.int64()).cast(pa.timestamp(kind.unit))
    texts: list[str | None] = array.cast(pa.string()).to_pylist()
    if any(text is not None and text.startswith(_OUT_OF_RANGE) for text in texts):
        texts = [
            _any_year(value, kind) if text is not None and text.startswith(_OUT_OF_RANGE) else text
            for text, value in zip(texts, _integers(array), strict=True)
        ]
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return [None if text is None else f"{text}Z" for text in texts]
    return texts


def _integers(array: pa.Array) -> list[int | None]:
    """Times and durations as their count of units."""
    stored = pa.int32() if pa.types.is_date32(array.type) else pa.int64()
    values: list[int | None] = array.cast(stored).to_pylist()
    return values


def _any_year(value: int | None, kind: pa.DataType) -> str | None:
    """`year-month-day`, of a timestamp with `hour:minute:second.digits`, of a count of units since 1970.

    numpy's calendar is proleptic, as Arrow's is, and knows every year that fits 64 bits.
    """
    if value is None or pa.types.is_date32(kind):
        return None if value is None else str(np.datetime64(value, "D"))
    if pa.types.is_date64(kind):
        return str(np.datetime64(value // (_SECONDS_A_DAY * _PER_SECOND["ms"]), "D"))
    per_second = _PER_SECOND[kind.unit]
    seconds, digits = divmod(value, per_second)
    days, second = divmod(seconds, _SECONDS_A_DAY)
    fraction = f".{digits:0{len(str(per_second)) - 1}d}" if per_second > 1 else ""
    return f"{np.datetime64(days, 'D')} {second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}{fraction}"


def _duration_text(value: int, unit: str) -> str:
    """ISO 8601, in seconds."""
    seconds, digits = divmod(abs(value), _PER_SECOND[unit])
    fraction = f".{digits:0{len(str(_PER_SECOND[unit])) - 1}d}".rstrip("0").rstrip(".") if unit != "s" else ""
    return f"{'-' if value < 0 else ''}PT{seconds}{fraction}S"
