"""Formats whose objects tell their columns before their rows, as Parquet does: a reader of single objects is enough."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import orjson
import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.columns.arrow_values import json_values
from batchllm_operators.columns.column_types import (
    always_fits,
    common_type,
    converted,
    has_form,
    plain,
    refuse_lost_values,
)
from batchllm_operators.errors import RowError, RowErrorCode, TerminalError
from batchllm_operators.formats.base import Reader
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.object_rows import ObjectColumns, ReadRows, Wanted
from batchllm_operators.formats.partitions import partitions_of
from batchllm_operators.formats.source import BATCH_ROWS, ROW_JSON, NumberedTable, RowBatch, Source, rows_only
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store

_OBJECTS_AT_A_TIME = 16


class TableReader(Reader):
    """Reads objects that tell their columns before their rows, each for itself; the rest is done by `ColumnarSource`.

    That is: columns that differ between objects, `source.columns`, `source.schema` and `source.limit`, numbers of rows
    over all objects, and rows as tables or as JSON for any sink.
    """

    @abstractmethod
    def columns_of(self, store: Store, name: str) -> ObjectColumns:
        """The columns of an object with their types; reads as little as tells them.

        Is called from several threads at once.

        Raises:
            TerminalError: damaged, or of another format; its `uri` names the object.
        """

    @abstractmethod
    def read(self, store: Store, name: str, columns: Sequence[str], batch_rows: int) -> Iterator[ReadRows]:
        """All rows of an object, in its order, each time the same; in memory that does not grow with the object.

        Args:
            store: the folder of the object; `store.reader(name)` gives its bytes.
            name: of the object.
            columns: those that are wanted, some of `columns_of`, perhaps none; others may be given too.
            batch_rows: rows to give at a time; more or fewer do no harm.

        Returns:
            Batches that have each of these columns, of the type that `columns_of` told. A row that cannot be read has
            nulls in its columns and stands in `faults`: it counts as a row, and becomes an error of that row alone.

        Raises:
            TerminalError: damaged, so that the rows behind the damage cannot be told apart; its `uri` names the object.
        """

    def open(self, spec: SourceSpec, found: FoundInput) -> Source:
        """The rows of all objects, as `ColumnarSource` puts them together."""
        return ColumnarSource(spec, found, self)


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column over all objects: its type, and the first object that has it so; or why it has none."""

    kind: pa.DataType
    path: str
    conflict: TerminalError | None = None


class ColumnarSource(Source):
    """Rows of objects that tell their columns; columns that some objects lack are null there.

    Where the type of a column differs between objects it is the one that holds the values of all. Where that depends
    on the values they are looked at in staging; where there is none the source is refused, with both objects' types.
    `source.schema` names the type instead.

    Args:
        spec: the source part of the job.
        found: the objects.
        reader: of single objects.
    """

    def __init__(self, spec: SourceSpec, found: FoundInput, reader: TableReader) -> None:
        super().__init__(spec, found)
        self._reader = reader
        self._partitions = partitions_of(spec, found)
        paths = [one.path for one in self.objects]
        with ThreadPoolExecutor(_OBJECTS_AT_A_TIME) as readers:
            told = readers.map(lambda path: self._with_partitions(reader.columns_of(self.store, path)), paths)
            self._told = dict(zip(paths, told, strict=True))
        self.rows = self._known_rows()
        self._pinned = spec.types()
        self._fitting: set[str] = set()
        self._columns = self._over_all_objects(self._type_in)
        self.require_columns(self._pinned, "source.schema")
        self._refuse_conflicts(self.carried())

    @property
    def columns(self) -> list[str]:
        """Names of the columns of all objects."""
        return list(self._columns)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the columns that go to the sink."""
        return self._settled(self.carried())

    def sink_schema(self, seen: pa.Schema) -> pa.Schema:
        """The columns as they are, but for those of nulls alone: not every reader of Parquet knows their type."""
        return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in seen])

    def _type_in(self, path: str, name: str, wanted: pa.DataType | None = None) -> pa.DataType:
        """The type in which a column of an object is read.

        Args:
            path: of the object.
            name: of the column.
            wanted: its type in the source; None: as long as that is not known.
        """
        del wanted
        return self._told[path].types[name]

    def _scan(self, path: str, fields: Sequence[pa.Field], wanted: Wanted | None = None) -> Iterator[ReadRows]:
        """The rows of an object with these columns, in batches.

        Args:
            path: of the object.
            fields: columns that it has, each with its type in the source.
            wanted: rows; others may be left out. None: all.
        """
        del wanted
        return self._reader.read(self.store, path, [field.name for field in fields], BATCH_ROWS)

    def _settle(self, names: Sequence[str]) -> None:
        """Decide what of the types of these columns depends on their values, before any other work is done."""

    def _with_partitions(self, told: ObjectColumns) -> ObjectColumns:
        """What an object tells, with its partition columns, which win over columns of their names."""
        own = [field for field in told.schema if field.name not in self._partitions.schema.names]
        return dataclasses.replace(told, schema=pa.schema([*own, *self._partitions.schema]))

    def _read(self, path: str, fields: Sequence[pa.Field], wanted: Wanted | None = None) -> Iterator[ReadRows]:
        """As `_scan`, partition columns included."""
        added = self._partitions.schema.names
        batches = self._scan(path, [field for field in fields if field.name not in added], wanted)
        if not added:
            return batches
        return (dataclasses.replace(batch, rows=self._beside_partitions(batch.rows, path)) for batch in batches)

    def _beside_partitions(self, batch: pa.RecordBatch, path: str) -> pa.RecordBatch:
        columns = self._partitions.columns_of(path, batch.num_rows)
        own = [name for name in batch.schema.names if name not in columns]
        arrays = [*(batch.column(name) for name in own), *columns.values()]
        return pa.RecordBatch.from_arrays(arrays, names=[*own, *columns])

    def _known_rows(self) -> int | None:
        if self._filter is not None:
            return None
        rows = 0
        for told in self._told.values():
            if told.rows is None:
                return None
            rows += told.rows
        return rows if self.spec.limit is None else min(rows, self.spec.limit)

    def check_filter(self) -> None:
        """Look whether the filter goes with the types of its columns."""
        super().check_filter()
        if self._filter is not None:
            self._filter.check(self._settled([name for name in self.columns if name in self._filter.columns]))

    def _all_batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        """All rows, with just these columns."""
        return self._batches(columns, None)

    def _filterable_batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        return self._batches(columns, Wanted(self._filter))

    def _batches(self, columns: Collection[str], wanted: Wanted | None) -> Iterator[RowBatch]:
        read = self._settled([name for name in self.columns if name in columns])
        schema = self.schema
        for first_row, table, reasons in self._all_rows(read, wanted):
            rows = table if len(read) else [{} for _ in range(len(table))]
            faults = {offset: RowError(RowErrorCode.INVALID_ROW, reason) for offset, reason in reasons.items()}
            yield RowBatch(first_row, rows, schema, faults)

    def _all_tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows as tables of this schema."""
        return (table for _, table, _ in self._all_rows(schema))

    def _tables_with(self, schema: pa.Schema, rows: Int64s) -> Iterator[NumberedTable]:
        return ((first_row, table) for first_row, table, _ in self._all_rows(schema, Wanted(rows=rows)))

    def _all_json_rows(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows, their values as `json_values` has them."""
        return (_as_json(table, schema.names) for table in self._all_tables(schema))

    def _json_rows_with(self, schema: pa.Schema, rows: Int64s) -> Iterator[NumberedTable]:
        return ((first_row, _as_json(table, schema.names)) for first_row, table in self._tables_with(schema, rows))

    def _all_rows(
        self, schema: pa.Schema, wanted: Wanted | None = None
    ) -> Iterator[tuple[int, pa.Table, dict[int, str]]]:
        """All rows as tables of this schema, of at most `BATCH_ROWS`, or all stretches with rows that are wanted.

        Each with the number of its first row, and row offset -> why it has none.
        """
        begin = 0
        for one in self.objects:
            told = self._told[one.path]
            present = [field for field in schema if field.name in told.types]
            # Where the number of rows is not known, no rows are left out.
            ours = None if wanted is None or told.rows is None else wanted.of_rows(begin, begin + told.rows)
            waiting: list[pa.Table] = []
            faults: dict[int, str] = {}
            waiting_rows, end = 0, begin
            for batch in _cut(self._read(one.path, present, ours)):
                self._require(batch.rows, present, one.path)
                first = end if batch.first_row is None else begin + batch.first_row
                if waiting and (first != end or waiting_rows + batch.rows.num_rows > BATCH_ROWS):
                    yield end - waiting_rows, pa.concat_tables(waiting), faults
                    waiting, faults, waiting_rows = [], {}, 0
                # An object of tiny row groups comes in tiny batches, each of which would cost as much as a full one.
                waiting.append(self._conform(batch.rows, schema, one.path))
                faults |= {waiting_rows + offset: reason for offset, reason in batch.faults.items()}
                waiting_rows += batch.rows.num_rows
                end = first + batch.rows.num_rows
            if waiting_rows:
                yield end - waiting_rows, pa.concat_tables(waiting), faults
            begin = end if told.rows is None else begin + told.rows

    def _over_all_objects(self, type_in: Callable[[str, str], pa.DataType]) -> dict[str, _Column]:
        columns: dict[str, _Column] = {}
        before: ObjectColumns | None = None
        for path, told in self._told.items():
            if before is not None and told.has_columns_of(before):
                continue
            before = told
            for name in told.types:
                columns[name] = self._with_object(columns.get(name), name, path, type_in(path, name))
        return columns

    def _with_object(self, known: _Column | None, name: str, path: str, kind: pa.DataType) -> _Column:
        kind = self._pinned.get(name, kind)
        if name in self._told[path].ambiguous:
            return _Column(kind, path, self._twice(name, path))
        if known is None and not has_form(kind):
            return _Column(kind, path, self._formless(name, kind, path))
        if known is None or known.conflict is not None:
            return known or _Column(kind, path)
        common = common_type(known.kind, kind)
        if common is None:
            return _Column(kind, path, self._drift(name, known, path, kind))
        return known if common.equals(known.kind) else _Column(common, path)

    def _settled(self, names: list[str]) -> pa.Schema:
        """Schema of these columns, whose values all fit into it; values of no other column are looked at."""
        self._refuse_conflicts(names)
        self._settle(names)
        schema = pa.schema([(name, self._columns[name].kind) for name in names])
        self._refuse_values_that_do_not_fit(schema)
        return schema

    def _refuse_conflicts(self, names: Collection[str]) -> None:
        for name in names:
            conflict = self._columns[name].conflict
            if conflict is not None:
                raise conflict

    def _refuse_values_that_do_not_fit(self, schema: pa.Schema) -> None:
        """Look at the values of columns whose type differs between objects, before any other work is done."""
        unseen = pa.schema([field for field in schema if field.name not in self._fitting])
        for path, told in self._told.items():
            doubtful = [
                field
                for field in unseen
                if field.name in told.types and not always_fits(self._type_in(path, field.name, field.type), field.type)
            ]
            if not doubtful:
                continue
            for batch in self._read(path, doubtful):
                self._require(batch.rows, doubtful, path)
                for field in doubtful:
                    self._refuse_unfit(batch.rows.column(field.name), field, path)
        self._fitting.update(unseen.names)

    def _refuse_unfit(self, array: pa.Array, field: pa.Field, path: str) -> None:
        values = converted(array, plain(array.type))
        is_pinned = field.name in self._pinned
        try:
            if is_pinned:
                converted(values, field.type)
            else:
                refuse_lost_values(values, field.type)
        except pa.ArrowException as error:
            raise self._unfit(field, values.type, path, error) from error

    def _unfit(self, field: pa.Field, kind: pa.DataType, path: str, error: Exception) -> TerminalError:
        if field.name in self._pinned:
            return TerminalError(
                f"source.schema: column {field.name!r} is {kind} in this object, and a value there is no"
                f" {field.type}: {error}",
                uri=self.store.uri_of(path),
            )
        other = self._columns[field.name].path
        return TerminalError(
            f"source: column {field.name!r} is {kind} in this object and {field.type} with {other}, and a value does"
            f" not go there without a loss: {error}; {_advice(field.name)}",
            uri=self.store.uri_of(path),
        )

    def _drift(self, name: str, known: _Column, path: str, kind: pa.DataType) -> TerminalError:
        return TerminalError(
            f"source: the schema of this object does not go together with {known.path}: column {name!r}:"
            f" {known.kind} vs {kind}; {_advice(name)}",
            uri=self.store.uri_of(path),
        )

    def _formless(self, name: str, kind: pa.DataType, path: str) -> TerminalError:
        return TerminalError(
            f"source: column {name!r} is {kind} in this object, which neither Parquet nor JSON has: select others with"
            " source.columns, and use none of this name in the prompt",
            uri=self.store.uri_of(path),
        )

    def _twice(self, name: str, path: str) -> TerminalError:
        return TerminalError(
            f"source: this object has more than one column {name!r}: select others with source.columns, and use none"
            " of this name in the prompt",
            uri=self.store.uri_of(path),
        )

    def _conform(self, batch: pa.RecordBatch, schema: pa.Schema, path: str) -> pa.Table:
        if not len(schema):
            return rows_only(batch.num_rows)
        columns = []
        for wanted in schema:
            if wanted.name not in batch.schema.names:
                columns.append(pa.nulls(batch.num_rows, wanted.type))
                continue
            array = batch.column(wanted.name)
            try:
                columns.append(converted(array, wanted.type))
            except pa.ArrowException as error:
                raise self._unfit(wanted, plain(array.type), path, error) from error
        return pa.Table.from_batches([pa.RecordBatch.from_arrays(columns, schema=schema)])

    def _require(self, batch: pa.RecordBatch, fields: Sequence[pa.Field], path: str) -> None:
        """Look whether the reader gave what it was asked for: a column that it forgot would be null in every row."""
        missing = [field.name for field in fields if field.name not in batch.schema.names]
        if missing:
            raise TerminalError(
                f"source: the reader of format {self.spec.format!r} told columns that it does not give:"
                f" {', '.join(missing)}",
                uri=self.store.uri_of(path),
            )


def _cut(batches: Iterator[ReadRows]) -> Iterator[ReadRows]:
    """The same rows in batches of at most `BATCH_ROWS`."""
    for batch in batches:
        rows = batch.rows.num_rows
        if rows <= BATCH_ROWS:
            yield batch
            continue
        for start in range(0, rows, BATCH_ROWS):
            ours = range(start, min(start + BATCH_ROWS, rows))
            faults = {place - start: reason for place, reason in batch.faults.items() if place in ours}
            first_row = None if batch.first_row is None else batch.first_row + start
            yield ReadRows(batch.rows.slice(start, len(ours)), faults, first_row)


def _as_json(table: pa.Table, names: list[str]) -> pa.Table:
    """Rows as one JSON object each, of these columns: all, or none (see `rows_only`)."""
    rows = zip(*map(json_values, table.columns), strict=True) if names else [()] * len(table)
    texts = [orjson.dumps(dict(zip(names, row, strict=True))) for row in rows]
    return pa.table([pa.array(texts, ROW_JSON.type)], schema=pa.schema([ROW_JSON]))


def _advice(name: str) -> str:
    return f"name its type in source.schema, for example {{{name}: string}}, or leave the column out of source.columns"
