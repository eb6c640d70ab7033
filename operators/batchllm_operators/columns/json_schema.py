"""Arrow types for JSON values, whose columns need not have one type.

Where the values of a column go together it has their Arrow type, else it is JSON text (`arrow.json`): then `1.0` and
`"1.0"` stay apart. Integers keep all their digits; a number with a fraction or an exponent is a double of about 16
digits, unless its column is JSON text. JSON text are columns with

- values of several types (text beside numbers, objects beside lists), also within objects and lists;
- integers beyond 64 bits, or beyond 2**53 beside numbers with a fraction;
- empty objects, objects with more than 256 keys over all rows, and values more than 16 deep.

Types of some rows are told by `json_schema` and put together by `unified`. There an int32 is an integer that a double
holds exactly, and an int64 one that it may not; `writable_type` makes int64 of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from batchllm_operators.columns.column_types import refuse_lost_values

JSON_TEXT = pa.json_()
_EXACT_IN_DOUBLE = 2**53
_MOST_FIELDS = 256
_MOST_DEPTH = 16
_CONVERSION_ERRORS = (pa.ArrowException, OverflowError)


def json_schema(records: list[dict[str, Any]], columns: list[str] | None) -> pa.Schema:
    """Types of the columns of some rows: all their keys in order of appearance, or just `columns`."""
    values: dict[str, list[Any]] = {name: [] for name in columns or ()}
    for record in records:
        if columns is None:
            for name, value in record.items():
                values.setdefault(name, []).append(value)
        else:
            for name in columns:
                values[name].append(record.get(name))
    return pa.schema([(name, _type_of(present)) for name, present in values.items()])


def unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for the rows of several: the common type of each column, or JSON text where there is none."""
    types: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            known = types.get(field.name)
            if known is None or not known.equals(field.type):
                types[field.name] = field.type if known is None else _common(known, field.type) or JSON_TEXT
    return pa.schema(list(types.items()))


def writable_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column of `unified` in a file: int64 for all integers, text where there is nothing but null."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, writable_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(writable_type(kind.value_type))
    return pa.int64() if pa.types.is_int32(kind) else pa.string() if pa.types.is_null(kind) else kind


def converted_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """The values as an array of a type that the job names, without a loss; texts of numbers and times become those.

    Raises:
        pa.ArrowException: a value is none of this type.
    """
    texts = pa.array([_as_text(value) for value in values], pa.string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return texts.cast(kind)
    try:
        array = pa.array(values)
        if pa.types.is_null(array.type):
            return pa.nulls(len(array), kind)
        if not pa.types.is_string(array.type):
            refuse_lost_values(array, kind)
            return array.cast(kind)
    except _CONVERSION_ERRORS:
        pass  # values of several types, integers beyond 64 bits: their texts may all be of this type
    return texts.cast(kind)


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        array = pa.array(values)
    except _CONVERSION_ERRORS:
        return JSON_TEXT
    return _told(array, 0) or JSON_TEXT


def _told(array: pa.Array, depth: int) -> pa.DataType | None:
    """The type of an array of JSON values; None where it is no type of a column."""
    kind = array.type
    if depth > _MOST_DEPTH:
        return None
    if pa.types.is_struct(kind):
        types = [(kind.field(place).name, _told(array.field(place), depth + 1)) for place in range(kind.num_fields)]
        fits = 0 < len(types) <= _MOST_FIELDS and all(inner is not None for _, inner in types)
        return pa.struct(types) if fits else None
    if pa.types.is_list(kind):
        item = _told(array.flatten(), depth + 1)
        return None if item is None else pa.list_(item)
    if pa.types.is_integer(kind):
        ends = pc.min_max(array).as_py()
        is_exact = ends["min"] is None or max(-ends["min"], ends["max"]) <= _EXACT_IN_DOUBLE
        return pa.int32() if is_exact else pa.int64()
    return kind


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if one.equals(other) or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        types: dict[str, pa.DataType | None] = {field.name: field.type for field in one}
        for field in other:
            known = types.get(field.name)
            types[field.name] = field.type if known is None else _common(known, field.type)
        fits = len(types) <= _MOST_FIELDS and None not in types.values()
        return pa.struct(list(types.items())) if fits else None
    if pa.types.is_list(one) and pa.types.is_list(other):
        item = _common(one.value_type, other.value_type)
        return None if item is None else pa.list_(item)
    numbers = {one, other}
    if numbers == {pa.int32(), pa.int64()}:
        return pa.int64()
    return pa.float64() if numbers == {pa.int32(), pa.float64()} else None


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # integers beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
