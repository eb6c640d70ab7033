"""Hypothesis strategies: Arrow tables of any type that Parquet holds."""

from __future__ import annotations

import base64
import math
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

Typed = tuple[pa.DataType, st.SearchStrategy[Any]]
"""A type, and values of it (without null) that `pa.array` takes for it, or integers for times and durations."""

_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
_UNITS = ("s", "ms", "us", "ns")
_ZONES = (None, "UTC", "Europe/Berlin", "+05:30", "Nowhere/Else")
_NANOSECONDS = {"day": 86_400 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_INT64 = st.integers(-(2**63), 2**63 - 1)


def _integers(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)


def _decimal(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    most = 10**precision - 1
    return st.integers(-most, most).map(lambda digits: Decimal(f"{digits}E{-scale}"))


_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_FLAT: list[Typed] = [
    (pa.null(), st.none()),
    (pa.bool_(), st.booleans()),
    *((getattr(pa, f"int{bits}")(), _integers(bits, signed=True)) for bits in (8, 16, 32, 64)),
    *((getattr(pa, f"uint{bits}")(), _integers(bits, signed=False)) for bits in (8, 16, 32, 64)),
    *((getattr(pa, f"float{bits}")(), st.floats(width=bits)) for bits in (16, 32, 64)),
    *((kind, st.text(st.characters(codec="utf-8"), max_size=9)) for kind in _TEXTS),
    *((kind(), st.binary(max_size=9)) for kind in (pa.binary, pa.large_binary, pa.binary_view)),
    (pa.binary(3), st.binary(min_size=3, max_size=3)),
    (pa.uuid(), st.binary(min_size=16, max_size=16)),
    (pa.json_(), st.sampled_from(['{"a": 1}', "1.0", "[]"])),
    (pa.decimal32(5, 2), _decimal(5, 2)),
    (pa.decimal64(12, 0), _decimal(12, 0)),
    (pa.decimal128(38, 10), _decimal(38, 10)),
    (pa.decimal256(70, 30), _decimal(70, 30)),
    (pa.date32(), st.integers(-(2**31), 2**31 - 1)),
    (pa.date64(), st.integers(-(10**6), 10**6).map(lambda days: days * 86_400_000)),
    (pa.time32("s"), st.integers(0, 86_399)),
    (pa.time32("ms"), st.integers(0, 86_399_999)),
    (pa.time64("us"), st.integers(0, 86_400 * 10**6 - 1)),
    (pa.time64("ns"), st.integers(0, 86_400 * 10**9 - 1)),
    # Parquet has no seconds: they are stored as milliseconds, which reach less far.
    *(
        (pa.timestamp(unit, zone), st.integers(-(2**53), 2**53) if unit == "s" else _INT64)
        for unit in _UNITS
        for zone in _ZONES
    ),
    *((pa.duration(unit), _INT64) for unit in _UNITS),
]  # fmt: skip
_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType)
_FROM_INTEGERS = (pa.types.is_date, pa.types.is_time, pa.types.is_timestamp, pa.types.is_duration)


def _listed(item: Typed) -> st.SearchStrategy[Typed]:
    kind, values = item
    lists = st.lists(st.none() | values, max_size=3)
    pairs: list[Typed] = [
        (pa.list_(kind), lists),
        (pa.large_list(kind), lists),
        (pa.list_view(kind), lists),
        (pa.list_(kind, 2), st.lists(st.none() | values, min_size=2, max_size=2)),
    ]
    return st.sampled_from(pairs)


def _mapped(typed: tuple[Typed, Typed]) -> Typed:
    (key, keys), (item, items) = typed
    return pa.map_(key, item), st.lists(st.tuples(keys, st.none() | items), max_size=3)


def _struct(fields: dict[str, Typed]) -> Typed:
    kind = pa.struct([(name, kind) for name, (kind, _) in fields.items()])
    return kind, st.fixed_dictionaries({name: st.none() | values for name, (_, values) in fields.items()})


_KEYS = st.sampled_from(
    [typed for typed in _FLAT if not (pa.types.is_null(typed[0]) or pa.types.is_floating(typed[0]))]
)
types: st.SearchStrategy[Typed] = st.sampled_from(_FLAT) | st.recursive(
    st.sampled_from(_FLAT),
    lambda inner: (
        inner.flatmap(_listed)
        | st.dictionaries(_NAMES, inner, min_size=1, max_size=3).map(_struct)
        | st.tuples(_KEYS, inner).map(_mapped)
    ),
    max_leaves=4,
)


def array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An array of these values; times and durations are counts of their unit."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    if any(is_kind(kind) for is_kind in _FROM_INTEGERS):
        stored = pa.int32() if kind.bit_width == 32 else pa.int64()
        return pa.array(values, stored).view(kind)
    mask = pa.array([value is None for value in values], pa.bool_())
    if pa.types.is_struct(kind):
        rows = [value or {} for value in values]
        children = [array([row.get(field.name) for row in rows], field.type) for field in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)
    if pa.types.is_map(kind) or isinstance(kind, _LISTS):
        return _nested(values, kind, mask)
    return pa.array(values, kind)


def _nested(values: list[Any], kind: pa.DataType, mask: pa.Array) -> pa.Array:
    if isinstance(kind, pa.FixedSizeListType):
        items = [item for value in values for item in (value or [None] * kind.list_size)]
        return pa.FixedSizeListArray.from_arrays(array(items, kind.value_type), type=kind, mask=mask)
    offsets = [0]
    for value in values:
        offsets.append(offsets[-1] + len(value or []))
    items = [item for value in values for item in value or []]
    if pa.types.is_map(kind):
        keys = array([key for key, _ in items], kind.key_type)
        return pa.MapArray.from_arrays(
            offsets, keys, array([item for _, item in items], kind.item_type), kind, mask=mask
        )
    if isinstance(kind, pa.ListViewType):
        sizes = [len(value or []) for value in values]
        starts = pa.array(offsets[:-1], pa.int32())
        children = array(items, kind.value_type)
        return pa.ListViewArray.from_arrays(starts, pa.array(sizes, pa.int32()), children, type=kind, mask=mask)
    builder = pa.LargeListArray if isinstance(kind, pa.LargeListType) else pa.ListArray
    return builder.from_arrays(offsets, array(items, kind.value_type), type=kind, mask=mask)


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, dict[str, list[Any]]]:
    """Up to four columns and four rows, some columns dictionary-encoded; and the values of each column."""
    rows = draw(st.integers(0, 4))
    columns, drawn = {}, {}
    for name in draw(st.lists(_NAMES, min_size=1, max_size=4, unique=True)):
        kind, values = draw(types)
        drawn[name] = draw(st.lists(st.none() | values, min_size=rows, max_size=rows))
        column = array(drawn[name], kind)
        if (pa.types.is_string(kind) or pa.types.is_int64(kind)) and draw(st.booleans()):
            column = column.dictionary_encode()
        columns[name] = column
    return pa.table(list(columns.values()), names=list(columns)), drawn


def matches(found: Any, value: Any, kind: pa.DataType) -> bool:
    """Whether a JSON value says the same as a value of this type that was drawn."""
    if found is None or value is None:
        return found is value
    if pa.types.is_dictionary(kind):
        return matches(found, value, kind.value_type)
    if pa.types.is_struct(kind):
        return found.keys() == value.keys() and all(
            matches(found[field.name], value[field.name], field.type) for field in kind
        )
    if pa.types.is_map(kind):
        # Of equal keys the last counts.
        return all(any(matches(key, one, kind.key_type) for one, _ in value) for key in found) and all(
            any(matches(key, one, kind.key_type) and matches(found[key], item, kind.item_type) for key in found)
            for place, (one, item) in enumerate(value)
            if all(one != later for later, _ in value[place + 1 :])
        )
    if isinstance(kind, _LISTS):
        return len(found) == len(value) and all(map(lambda a, b: matches(a, b, kind.value_type), found, value))
    return _same(found, value, kind)


def _same(found: Any, value: Any, kind: pa.DataType) -> bool:
    if isinstance(value, float):
        return math.isnan(value) if found == "NaN" else float(found) == value
    if isinstance(value, Decimal):
        return isinstance(found, str) and Decimal(found) == value
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid":
        return UUID(found).bytes == value
    if isinstance(value, bytes):
        return base64.b64decode(found) == value
    if isinstance(value, bool | str):
        return found == value or found == str(value).lower()
    if pa.types.is_integer(kind):
        return int(found) == value
    return _nanoseconds(found) == value * _NANOSECONDS[_unit(kind)]


def _unit(kind: pa.DataType) -> str:
    return "day" if pa.types.is_date32(kind) else "ms" if pa.types.is_date64(kind) else kind.unit


def _nanoseconds(text: str) -> int:
    """A day, a time of day, both, or a duration, as nanoseconds since 1970 or 0:00."""
    if "PT" in text:
        sign, _, seconds = text.removesuffix("S").partition("PT")
        return (-1 if sign else 1) * int(Decimal(seconds) * 10**9)
    day, _, clock = text.removesuffix("Z").rpartition(" ") if ":" in text else (text, "", "0:0:0")
    hours, minutes, seconds = clock.split(":")
    within = (int(hours) * 60 + int(minutes)) * 60 * 10**9 + int(Decimal(seconds) * 10**9)
    return (int(np.datetime64(day, "D").astype(int)) * 86_400 * 10**9 if day else 0) + within
