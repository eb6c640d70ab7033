"""Rows of JSON Lines objects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing
from typing import Any

import orjson
import pyarrow as pa

from batchllm_operators.columns.arrow_values import python_rows
from batchllm_operators.columns.json_schema import JSON_TEXT, converted_column, json_schema, writable_type
from batchllm_operators.errors import RowError, RowErrorCode
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.json_lines import JsonLine, member_texts, read_json_lines, with_members
from batchllm_operators.formats.partitions import partitions_of
from batchllm_operators.formats.source import BATCH_ROWS, ROW_JSON, RowBatch, Source, rows_only
from batchllm_operators.specs.source import SourceSpec


class JsonlSource(Source):
    """Rows of JSON Lines objects, plain or compressed; blank lines are no rows.

    A line that does not decode is a row with a fault, and so is one with a value that is not of the type that
    `source.schema` names. The types of other columns are those of `json_schema`.
    """

    unites_keys = False

    def __init__(self, spec: SourceSpec, found: FoundInput) -> None:
        super().__init__(spec, found)
        self._types = spec.types()
        self._partitions = partitions_of(spec, found)
        self.has_columns = False
        self._keys = dict.fromkeys(self._types)
        with closing(self._line_batches()) as batches:
            first = next(batches, [])
        self._see(first)
        self._is_read_through = len(first) < BATCH_ROWS or (spec.limit is not None and spec.limit <= BATCH_ROWS)

    @property
    def columns(self) -> list[str]:
        """Columns of `source.schema`, and keys of the rows read so far, in order of appearance."""
        return list(self._keys)

    @property
    def schema(self) -> pa.Schema:
        """Nothing is known of the types before the rows are read."""
        self.carried()
        return pa.schema([])

    def missing(self, names: Collection[str]) -> list[str]:
        """Which of these are no columns of any row; rows are read until all are found, at most once to the end."""
        missing = super().missing(names)
        if missing and not self._is_read_through:
            with closing(self._reading_through()) as reading:
                for _ in reading:
                    missing = super().missing(names)
                    if not missing:
                        break
        return missing

    def find_all_columns(self, progress: Callable[[int], None]) -> None:
        """Read all rows for their keys, unless that is done."""
        if not self._is_read_through:
            for rows in self._reading_through():
                progress(rows)

    def _reading_through(self) -> Generator[int]:
        """Sees the keys of all rows, batch by batch; yields the number of rows so far."""
        rows = 0
        with closing(self._line_batches()) as batches:
            for lines in batches:
                self._see(lines)
                rows += len(lines)
                yield rows
                if self.spec.limit is not None and rows >= self.spec.limit:
                    break
        self._is_read_through = True

    def _all_batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        """All rows, whole; a key of `columns` that a line lacks is null."""
        first_row = 0
        for lines in self._line_batches():
            records = [line.record for line in lines]
            faults = {offset: line.fault for offset, line in enumerate(lines) if line.fault is not None}
            schema = json_schema(records, self.spec.columns)
            for name, kind in self._types.items():
                schema = _with_type(schema, name, kind)
                for offset, fault in _convert(records, name, kind).items():
                    faults.setdefault(offset, fault)
            for name in columns:
                for record in records:
                    record.setdefault(name, None)
            yield RowBatch(first_row, records, schema, faults)
            first_row += len(lines)

    def sink_schema(self, seen: pa.Schema) -> pa.Schema:
        """The columns that were seen, with those of `source.schema`."""
        types = {field.name: writable_type(field.type) for field in seen}
        for name, kind in self._types.items():
            if self.spec.columns is None or name in self.spec.columns:
                types[name] = kind
        return pa.schema(list(types.items()))

    def _all_tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows as tables of this schema; a value that does not convert, whose row has that fault, is null."""
        has_json = any(field.type.equals(JSON_TEXT) for field in schema)
        for lines in self._line_batches():
            texts = [member_texts(line.text) if has_json else {} for line in lines]
            columns = [
                _json_texts(texts, field.name)
                if field.type.equals(JSON_TEXT)
                else self._column([line.record.get(field.name) for line in lines], field)
                for field in schema
            ]
            yield pa.Table.from_arrays(columns, schema=schema) if columns else rows_only(len(lines))

    def _all_json_rows(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows as they stand in the input; with just the selected columns where there is a selection."""
        names = None if self.spec.columns is None else schema.names
        for lines in self._line_batches():
            rows = [_own_text(line) if names is None else _selected(line, names) for line in lines]
            yield pa.table([pa.array(rows, ROW_JSON.type)], schema=pa.schema([ROW_JSON]))

    def _column(self, values: list[Any], field: pa.Field) -> pa.Array:
        if field.name in self._types:
            return _converted(values, field.type)[0]
        return pa.array(values, field.type)

    def _see(self, lines: list[JsonLine]) -> None:
        self.has_columns = self.has_columns or any(line.fault is None for line in lines)
        self._keys.update(dict.fromkeys(key for line in lines for key in line.record))

    def _line_batches(self) -> Generator[list[JsonLine]]:
        batch: list[JsonLine] = []
        for one in self.objects:
            values = self._partitions.values_of(one.path) if self._partitions.paths else {}
            with self.store.reader(one.path) as file:
                for line in read_json_lines(file, one.path):
                    batch.append(with_members(line, values) if values else line)
                    if len(batch) == BATCH_ROWS:
                        yield batch
                        batch = []
        if batch:
            yield batch


def _own_text(line: JsonLine) -> bytes:
    # Within an object a carriage return can only be blank space, and would end a line for many readers.
    return line.text.replace(b"\r", b" ")


def _selected(line: JsonLine, names: list[str]) -> bytes:
    """The object with just these members, in this order."""
    texts = member_texts(_own_text(line))
    return orjson.dumps({name: orjson.Fragment(texts[name]) for name in names if name in texts})


def _json_texts(texts: list[dict[str, str]], name: str) -> pa.Array:
    """A column as JSON text; a JSON null is null, as in columns of any other type."""
    values = [members.get(name) for members in texts]
    return pa.array([None if value == "null" else value for value in values], pa.string()).cast(JSON_TEXT)


def _with_type(schema: pa.Schema, name: str, kind: pa.DataType) -> pa.Schema:
    place = schema.get_field_index(name)
    return schema if place < 0 else schema.set(place, pa.field(name, kind))


def _convert(records: list[dict[str, Any]], name: str, kind: pa.DataType) -> dict[int, RowError]:
    """Make the values of a column those of a type, in place; row offset -> fault where that cannot be."""
    if kind.equals(JSON_TEXT):
        return {}
    present = [offset for offset, record in enumerate(records) if record.get(name) is not None]
    array, bad = _converted([records[offset][name] for offset in present], kind)
    faults = {
        present[place]: RowError(
            RowErrorCode.INVALID_ROW,
            f"column {name!r}: expected {kind} (source.schema), got {_shown(records[present[place]][name])}",
        )
        for place in bad
    }
    values, _ = python_rows(pa.table([array], names=[name]))
    for offset, value in zip(present, values, strict=True):
        records[offset] = records[offset] | value
    return faults


def _converted(values: list[Any], kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """The values as an array of this type, and the places of those that do not convert, which are null in it."""
    try:
        return converted_column(values, kind), []
    except pa.ArrowException:
        pass
    pieces, bad = [], []
    for place, value in enumerate(values):
        try:
            pieces.append(converted_column([value], kind))
        except pa.ArrowException:
            pieces.append(pa.nulls(1, kind))
            bad.append(place)
    return pa.concat_arrays(pieces), bad


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
