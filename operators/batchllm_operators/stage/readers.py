"""Input rows: finds the objects of a source and streams their rows in input order with bounded memory.

Staging reads the rows as Python records to render prompts; merge reads them again as Arrow tables of one schema.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa

from batchllm_operators.errors import RowError, TerminalError
from batchllm_operators.plan.arrays import Int8s
from batchllm_operators.records import InputObject
from batchllm_operators.stage.input_objects import find_input
from batchllm_operators.stage.json_lines import JsonLine, read_json_lines
from batchllm_operators.stage.json_schema import json_column, json_schema
from batchllm_operators.stage.spec import SourceSpec
from batchllm_operators.store import Store

BATCH_ROWS = 1024
_SUFFIXES = {"parquet": (".parquet", ".parq", ".pq"), "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")}
_FOOTER_READERS = 16


@dataclass(frozen=True)
class RowBatch:
    """Consecutive input rows.

    Attributes:
        first_row: index of the first row over all objects of the source.
        rows: the rows, as an Arrow table or as records.
        faults: row offset -> why the row could not be read; such a row is an empty record.
        schema: types of the columns that go to the sink, as this batch shows them.
        field_order: int8 [rows, fields], for a prompt of kind `fields`: its columns by number, in the order of each
            row's prompt; None: as given.
    """

    first_row: int
    rows: pa.Table | list[dict[str, Any]]
    schema: pa.Schema
    faults: dict[int, RowError] = field(default_factory=dict)
    field_order: Int8s | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def slice(self, start: int, rows: int) -> RowBatch:
        """Some consecutive rows of this batch, as `pyarrow.Table.slice`."""
        table = self.rows[start : start + rows] if isinstance(self.rows, list) else self.rows.slice(start, rows)
        faults = {offset - start: fault for offset, fault in self.faults.items() if 0 <= offset - start < rows}
        order = None if self.field_order is None else self.field_order[start : start + rows]
        return RowBatch(self.first_row + start, table, self.schema, faults, order)

    def field_order_of(self, offset: int) -> list[int] | None:
        """Numbers of the fields of one row, in the order of its prompt; None: as given."""
        return None if self.field_order is None else self.field_order[offset].tolist()

    def records(self) -> list[dict[str, Any]]:
        """The rows as column name -> Python value."""
        if isinstance(self.rows, list):
            return self.rows
        records: list[dict[str, Any]] = self.rows.to_pylist(maps_as_pydicts="lossy")
        return records


_Rows = TypeVar("_Rows", RowBatch, pa.Table)


class Source(ABC):
    """The rows of all objects that a source URI names, in the order of the objects' paths.

    Attributes:
        objects: fingerprint of the input.
        has_columns: whether `columns` is known; not so for JSONL without one readable row.
        rows: number of rows; None where only reading them tells (JSONL).
    """

    has_columns = True
    rows: int | None = None

    def __init__(self, spec: SourceSpec, store: Store, objects: list[InputObject]) -> None:
        self.spec = spec
        self.store = store
        self.objects = objects

    def look_again(self) -> list[InputObject]:
        """What `objects` would be if the source were opened now."""
        return find_input(self.spec.uri, self.spec.storage, _SUFFIXES[self.spec.format])[1]

    def object_uris(self) -> list[str]:
        """URIs of the input objects."""
        return [self.store.uri_of(one.path) for one in self.objects]

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns; of JSONL, the keys of the first batch of rows."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Schema of the columns that go to the sink as known without reading rows; of JSONL, an empty one.

        Raises:
            TerminalError: `source.columns` names a column that does not exist.
        """

    def batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        """All rows, or the first `source.limit`, in batches of at most `BATCH_ROWS`.

        Args:
            columns: those to read; others may be there too.
        """
        return _first_rows(self._all_batches(columns), self.spec.limit)

    def tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """The same rows again, in batches, as tables of this schema (the union of the schemas of all batches)."""
        return _first_rows(self._all_tables(schema), self.spec.limit)

    @abstractmethod
    def _all_batches(self, columns: Collection[str]) -> Iterator[RowBatch]: ...

    @abstractmethod
    def _all_tables(self, schema: pa.Schema) -> Iterator[pa.Table]: ...

    def _carried(self) -> list[str]:
        """Columns that go to the sink."""
        if self.spec.columns is None:
            return self.columns
        self.require_columns(self.spec.columns, "source.columns")
        return self.spec.columns

    def require_columns(self, names: Collection[str], field_name: str) -> None:
        """Refuse a part of the job that names columns which do not exist.

        Raises:
            TerminalError: lists the missing names and the columns there are.
        """
        missing = sorted(set(names) - set(self.columns))
        if missing and self.has_columns:
            raise TerminalError(
                f"{field_name}: no such column: {', '.join(missing)}; columns: {', '.join(self.columns) or 'none'}",
                uri=self.spec.uri,
            )


def open_source(spec: SourceSpec) -> Source:
    """Find the objects of a source and look at their columns.

    Raises:
        TerminalError: no object matches, no access, an unreadable Parquet object, or objects whose schemas disagree.
    """
    store, objects = find_input(spec.uri, spec.storage, _SUFFIXES[spec.format])
    kind = ParquetSource if spec.format == "parquet" else JsonlSource
    return kind(spec, store, objects)


class ParquetSource(Source):
    """Rows of Parquet objects; columns that some objects lack are null there."""

    def __init__(self, spec: SourceSpec, store: Store, objects: list[InputObject]) -> None:
        super().__init__(spec, store, objects)
        names = [one.path for one in objects]
        with ThreadPoolExecutor(_FOOTER_READERS) as readers:
            footers = list(readers.map(store.parquet_schema, names))
        rows = sum(rows for _, rows in footers)
        self.rows = rows if spec.limit is None else min(rows, spec.limit)
        self._object_columns = {name: set(schema.names) for name, (schema, _) in zip(names, footers, strict=True)}
        self._unified = pa.schema([])
        for name, (schema, _) in zip(names, footers, strict=True):
            self._unified = self._unify(schema, name)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of all objects."""
        return list(self._unified.names)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the columns that go to the sink."""
        return pa.schema([self._unified.field(name) for name in self._carried()])

    def _all_batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        """All rows, with just these columns."""
        wanted = pa.schema([field for field in self._unified if field.name in columns])
        schema = self.schema
        first_row = 0
        for table in self._all_tables(wanted):
            yield RowBatch(first_row, table, schema)
            first_row += len(table)

    def _all_tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows as tables of this schema."""
        for one in self.objects:
            present = [name for name in schema.names if name in self._object_columns[one.path]]
            waiting: list[pa.Table] = []
            waiting_rows = 0
            for batch in self.store.scan_parquet(one.path, present, BATCH_ROWS):
                if waiting and waiting_rows + batch.num_rows > BATCH_ROWS:
                    yield pa.concat_tables(waiting)
                    waiting, waiting_rows = [], 0
                # An object of tiny row groups comes in tiny batches, each of which would cost as much as a full one.
                waiting.append(self._conform(batch, schema, one.path))
                waiting_rows += batch.num_rows
            if waiting_rows:
                yield pa.concat_tables(waiting)

    def _unify(self, schema: pa.Schema, name: str) -> pa.Schema:
        plain = pa.schema([pa.field(field.name, _plain(field.type)) for field in schema])
        try:
            return pa.unify_schemas([self._unified, plain], promote_options="permissive")
        except pa.ArrowException as error:
            raise TerminalError(
                f"source: the schema of this object does not go together with those before it: {error}",
                uri=self.store.uri_of(name),
            ) from error

    def _conform(self, batch: pa.RecordBatch, schema: pa.Schema, name: str) -> pa.Table:
        columns = []
        for wanted in schema:
            if wanted.name not in batch.schema.names:
                columns.append(pa.nulls(batch.num_rows, wanted.type))
                continue
            try:
                columns.append(batch.column(wanted.name).cast(wanted.type))
            except pa.ArrowException as error:
                raise TerminalError(
                    f"source: column {wanted.name!r} of this object does not convert to {wanted.type}, its type over"
                    f" all objects: {error}",
                    uri=self.store.uri_of(name),
                ) from error
        # A table without columns would forget its number of rows.
        return (
            pa.Table.from_batches([pa.RecordBatch.from_arrays(columns, schema=schema)])
            if columns
            else _rows_only(batch.num_rows)
        )


class JsonlSource(Source):
    """Rows of JSON Lines objects, plain or gzip; blank lines are no rows.

    A line that does not decode is a row with a fault. Where the values of one column have types that do not go
    together, the column becomes text, and values that are not text stand there as JSON.
    """

    def __init__(self, spec: SourceSpec, store: Store, objects: list[InputObject]) -> None:
        super().__init__(spec, store, objects)
        with closing(self._line_batches()) as batches:
            first = next(batches, [])
        self.has_columns = any(line.fault is None for line in first)
        self._columns = list(dict.fromkeys(key for line in first for key in line.record))

    @property
    def columns(self) -> list[str]:
        """Keys of the first batch of rows, in order of appearance."""
        return self._columns

    @property
    def schema(self) -> pa.Schema:
        """Nothing is known of the types before the rows are read."""
        self._carried()
        return pa.schema([])

    def _all_batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        """All rows; `columns` does not matter here: a line is parsed whole."""
        del columns
        first_row = 0
        for lines in self._line_batches():
            records = [line.record for line in lines]
            faults = {offset: line.fault for offset, line in enumerate(lines) if line.fault is not None}
            yield RowBatch(first_row, records, json_schema(records, self.spec.columns), faults)
            first_row += len(lines)

    def _all_tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows as tables of this schema."""
        for lines in self._line_batches():
            columns = [json_column([line.record.get(field.name) for line in lines], field.type) for field in schema]
            yield pa.Table.from_arrays(columns, schema=schema) if columns else _rows_only(len(lines))

    def _line_batches(self) -> Generator[list[JsonLine]]:
        batch: list[JsonLine] = []
        for one in self.objects:
            with self.store.reader(one.path) as file:
                for line in read_json_lines(file, one.path):
                    batch.append(line)
                    if len(batch) == BATCH_ROWS:
                        yield batch
                        batch = []
        if batch:
            yield batch


def _first_rows(batches: Iterator[_Rows], limit: int | None) -> Iterator[_Rows]:
    """The batches up to a number of rows; not one more is read."""
    if limit is None:
        yield from batches
        return
    left = limit
    while left > 0 and (batch := next(batches, None)) is not None:
        yield batch if len(batch) <= left else batch.slice(0, left)
        left -= len(batch)


def _rows_only(rows: int) -> pa.Table:
    """A table of rows without columns."""
    return pa.table({"row": pa.nulls(rows)}).select([])


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without an encoding that only some objects may use."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if kind == pa.string_view():
        return pa.string()
    return pa.binary() if kind == pa.binary_view() else kind
