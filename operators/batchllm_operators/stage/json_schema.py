"""Arrow types for JSON values, whose columns need not have one type."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
import pyarrow as pa

_CONVERSION_ERRORS = (pa.ArrowException, OverflowError)


def json_schema(records: list[dict[str, Any]], columns: list[str] | None) -> pa.Schema:
    """Types of the columns of some rows: all their keys in order of appearance, or just `columns`."""
    names = columns if columns is not None else list(dict.fromkeys(key for record in records for key in record))
    return pa.schema([(name, _type_of([record.get(name) for record in records])) for name in names])


def unified(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for the rows of several: the common type of each column, or text where there is none."""
    types: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            known = types.get(field.name)
            if known is None or not known.equals(field.type):
                types[field.name] = field.type if known is None else _common(known, field.type)
    return pa.schema(list(types.items()))


def json_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """The values as an array of this type, which is the common type of the whole column."""
    if pa.types.is_string(kind):
        return pa.array([_as_text(value) for value in values], kind)
    try:
        return pa.array(values, kind)
    except _CONVERSION_ERRORS:
        # Integers beyond 2**53 where the column has floats: JSON numbers lose digits there, as everywhere else.
        return pa.array([_with_floats(value, kind) for value in values], kind)


def writable(schema: pa.Schema) -> pa.Schema:
    """The schema with a type that Parquet keeps for columns that hold nothing but null."""
    return pa.schema([(field.name, pa.string() if pa.types.is_null(field.type) else field.type) for field in schema])


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        kind = pa.array(values).type
    except _CONVERSION_ERRORS:
        return pa.string()
    return pa.string() if _has_empty_struct(kind) else kind


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    try:
        schemas = [pa.schema([("column", one)]), pa.schema([("column", other)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _has_empty_struct(kind: pa.DataType) -> bool:
    """Whether the type holds a struct without fields, which Parquet cannot write."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_has_empty_struct(field.type) for field in kind)
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()


def _with_floats(value: Any, kind: pa.DataType) -> Any:
    """The value with floats where the type has them, and nowhere else: other integers keep all their digits."""
    if value is None:
        return None
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_list(kind):
        return [_with_floats(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _with_floats(value.get(field.name), field.type) for field in kind}
    return value
