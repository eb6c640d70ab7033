"""Rows of Parquet objects."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import orjson
import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.stage.arrow_values import json_values
from batchllm_operators.stage.column_types import (
    always_fits,
    common_type,
    converted,
    leaves,
    plain,
    refuse_lost_values,
    with_leaves,
)
from batchllm_operators.stage.input_objects import FoundInput
from batchllm_operators.stage.object_content import other_than_parquet
from batchllm_operators.stage.source import BATCH_ROWS, ROW_JSON, RowBatch, Source, rows_only
from batchllm_operators.stage.spec import SourceSpec
from batchllm_operators.store import Store

Int96Unit = Literal["us", "ns"]
"""Unit in which timestamps of 96 bits are read: no unit of 64 bits holds both their digits and their years."""
_FOOTER_READERS = 16
_HEAD_BYTES = 16


@dataclass(frozen=True)
class _Footer:
    """What the end of an object tells.

    Attributes:
        types: column -> type, encodings left out; timestamps of 96 bits in nanoseconds, as Arrow reads them unasked.
        ambiguous: names that more than one column has.
        int96: columns that hold timestamps of 96 bits.
        rows: number of rows.
    """

    types: dict[str, pa.DataType]
    ambiguous: frozenset[str]
    int96: frozenset[str]
    rows: int

    def has_columns_of(self, other: _Footer) -> bool:
        """Whether both have the same columns, as most objects of a folder do."""
        return (self.types, self.ambiguous, self.int96) == (other.types, other.ambiguous, other.int96)

    def type_of(self, name: str, unit: Int96Unit) -> pa.DataType:
        kind = self.types[name]
        return _with_unit(kind, unit) if name in self.int96 else kind


@dataclass(frozen=True)
class _Column:
    """A column over all objects: its type, and the first object that has it so; or why it has none."""

    kind: pa.DataType
    path: str
    conflict: TerminalError | None = None


class ParquetSource(Source):
    """Rows of Parquet objects; columns that some objects lack are null there.

    Where the type of a column differs between objects it is the one that holds the values of all. Where that depends
    on the values they are looked at in staging; where there is none the source is refused, with both objects' types.
    `source.schema` names the type instead.
    """

    def __init__(self, spec: SourceSpec, found: FoundInput) -> None:
        super().__init__(spec, found)
        paths = [one.path for one in self.objects]
        with ThreadPoolExecutor(_FOOTER_READERS) as readers:
            footers = readers.map(lambda path: _read_footer(self.store, path), paths)
            self._footers = dict(zip(paths, footers, strict=True))
        rows = sum(footer.rows for footer in self._footers.values())
        self.rows = rows if spec.limit is None else min(rows, spec.limit)
        self._pinned = spec.types()
        self._fitting: set[str] = set()
        self._columns = self._over_all_objects("us")
        self.require_columns(self._pinned, "source.schema")
        self._refuse_conflicts(self._carried())

    @property
    def columns(self) -> list[str]:
        """Names of the columns of all objects."""
        return list(self._columns)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the columns that go to the sink."""
        return self._settled(self._carried())

    def _all_batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        """All rows, with just these columns."""
        wanted = self._settled([name for name in self.columns if name in columns])
        schema = self.schema
        first_row = 0
        for table in self._all_tables(wanted):
            rows = table if len(wanted) else [{} for _ in range(len(table))]
            yield RowBatch(first_row, rows, schema)
            first_row += len(table)

    def sink_schema(self, seen: pa.Schema) -> pa.Schema:
        """The columns as they are, but for those of nulls alone: not every reader of Parquet knows their type."""
        return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in seen])

    def _all_tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows as tables of this schema."""
        unit = self._unit_of(schema)
        for one in self.objects:
            present = [name for name in schema.names if name in self._footers[one.path].types]
            waiting: list[pa.Table] = []
            waiting_rows = 0
            for batch in self.store.scan_parquet(one.path, present, BATCH_ROWS, int96_unit=unit):
                if waiting and waiting_rows + batch.num_rows > BATCH_ROWS:
                    yield pa.concat_tables(waiting)
                    waiting, waiting_rows = [], 0
                # An object of tiny row groups comes in tiny batches, each of which would cost as much as a full one.
                waiting.append(self._conform(batch, schema, one.path))
                waiting_rows += batch.num_rows
            if waiting_rows:
                yield pa.concat_tables(waiting)

    def _all_json_rows(self, schema: pa.Schema) -> Iterator[pa.Table]:
        """All rows, their values as `json_values` has them."""
        names = schema.names
        for table in self._all_tables(schema):
            rows = zip(*map(json_values, table.columns), strict=True) if names else [()] * len(table)
            texts = [orjson.dumps(dict(zip(names, row, strict=True))) for row in rows]
            yield pa.table([pa.array(texts, ROW_JSON.type)], schema=pa.schema([ROW_JSON]))

    def _over_all_objects(self, unit: Int96Unit) -> dict[str, _Column]:
        columns: dict[str, _Column] = {}
        before: _Footer | None = None
        for path, footer in self._footers.items():
            if before is not None and footer.has_columns_of(before):
                continue
            before = footer
            for name in footer.types:
                columns[name] = self._with_object(columns.get(name), name, path, unit)
        return columns

    def _with_object(self, known: _Column | None, name: str, path: str, unit: Int96Unit) -> _Column:
        footer = self._footers[path]
        kind = self._pinned.get(name, footer.type_of(name, unit))
        if name in footer.ambiguous:
            return _Column(kind, path, self._twice(name, path))
        if known is None or known.conflict is not None:
            return known or _Column(kind, path)
        common = common_type(known.kind, kind)
        if common is None:
            return _Column(kind, path, self._drift(name, known, path, kind))
        return known if common.equals(known.kind) else _Column(common, path)

    def _settled(self, names: list[str]) -> pa.Schema:
        """Schema of these columns, whose values all fit into it."""
        columns = self._settled_columns
        self._refuse_conflicts(names)
        schema = pa.schema([(name, columns[name].kind) for name in names])
        self._refuse_values_that_do_not_fit(schema)
        return schema

    @cached_property
    def _settled_columns(self) -> dict[str, _Column]:
        """The columns with the unit that their timestamps of 96 bits need, which is found by a look at all of them."""
        if self._int96_unit() == "ns":
            self._columns = self._over_all_objects("ns")
            self._refuse_conflicts(self._carried())
        return self._columns

    def _int96_unit(self) -> Int96Unit:
        """Microseconds, unless a timestamp has more digits.

        Raises:
            TerminalError: one has more digits, and another (or the type that the job names) has no nanoseconds.
        """
        digits: tuple[str, str] | None = None
        far: tuple[str, str] | None = None
        for path, footer in self._footers.items():
            names = sorted(footer.int96 - self._pinned.keys() - footer.ambiguous)
            if not names:
                continue
            scans = [self.store.scan_parquet(path, names, BATCH_ROWS, int96_unit=unit) for unit in ("ns", "us")]
            for fine, coarse in zip(*scans, strict=True):
                for name in names:
                    has_digits, has_far_years = _needs(fine.column(name), coarse.column(name))
                    digits = digits or ((name, path) if has_digits else None)
                    far = far or ((name, path) if has_far_years else None)
        pinned = [name for name, kind in self._pinned.items() if self._is_int96(name) and not _is_in_nanoseconds(kind)]
        if digits is None:
            return "us"
        if far is not None or pinned:
            other = f"a year that nanoseconds do not reach ({far[0]!r} in {far[1]})" if far else f"{pinned[0]!r}"
            raise TerminalError(
                f"source: column {digits[0]!r} has timestamps of 96 bits with nanoseconds, beside {other}: name the"
                f" type in source.schema to read them without, for example {{{digits[0]}: timestamp[us]}}",
                uri=self.store.uri_of(digits[1]),
            )
        return "ns"

    def _unit_of(self, schema: pa.Schema) -> Int96Unit:
        """The unit that staging found, as the schema shows it."""
        kinds = [field.type for field in schema if self._is_int96(field.name)]
        return "ns" if any(_is_in_nanoseconds(kind) for kind in kinds) else "us"

    def _is_int96(self, name: str) -> bool:
        return any(name in footer.int96 for footer in self._footers.values())

    def _refuse_conflicts(self, names: Collection[str]) -> None:
        for name in names:
            conflict = self._columns[name].conflict
            if conflict is not None:
                raise conflict

    def _refuse_values_that_do_not_fit(self, schema: pa.Schema) -> None:
        """Look at the values of columns whose type differs between objects, before any other work is done."""
        unit = self._unit_of(schema)
        unseen = pa.schema([field for field in schema if field.name not in self._fitting])
        for path, footer in self._footers.items():
            doubtful = [
                field
                for field in unseen
                if field.name in footer.types and not always_fits(footer.type_of(field.name, unit), field.type)
            ]
            if not doubtful:
                continue
            names = [field.name for field in doubtful]
            for batch in self.store.scan_parquet(path, names, BATCH_ROWS, int96_unit=unit):
                for field in doubtful:
                    self._refuse_unfit(batch.column(field.name), field, path)
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


def _read_footer(store: Store, path: str) -> _Footer:
    try:
        with store.parquet(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            leaf_columns = [file.schema.column(place) for place in range(len(file.schema.names))]
    except TerminalError as error:
        with store.reader(path) as content:
            what = other_than_parquet(content.read(_HEAD_BYTES))
        if what is None:
            raise
        raise TerminalError(f"{error.message}; it is {what}", uri=error.uri) from error
    int96 = {leaf.path.split(".")[0] for leaf in leaf_columns if leaf.physical_type == "INT96"}
    names = schema.names
    return _Footer(
        types={field.name: plain(field.type) for field in schema},
        ambiguous=frozenset(name for name in names if names.count(name) > 1),
        # A name with a dot looks like a path; then the first piece is no column.
        int96=frozenset(name for name in names if name in int96 or name.split(".")[0] in int96),
        rows=rows,
    )


def _advice(name: str) -> str:
    return f"name its type in source.schema, for example {{{name}: string}}, or leave the column out of source.columns"


def _with_unit(kind: pa.DataType, unit: Int96Unit) -> pa.DataType:
    """The type with timestamps of this unit where it has such of nanoseconds, at any depth."""
    return with_leaves(
        kind, lambda leaf: pa.timestamp(unit, leaf.tz) if pa.types.is_timestamp(leaf) and leaf.unit == "ns" else leaf
    )


def _is_in_nanoseconds(kind: pa.DataType) -> bool:
    return not _with_unit(kind, "us").equals(kind)


def _needs(fine: pa.Array, coarse: pa.Array) -> tuple[bool, bool]:
    """Whether timestamps, read in nanoseconds and in microseconds, have digits, and years, that only one unit has."""
    has_digits = has_far_years = False
    for one, other in zip(leaves(fine), leaves(coarse), strict=True):
        if one.type != other.type:
            nanoseconds = one.cast(pa.int64()).drop_null().to_numpy()
            agree = nanoseconds // 1000 == other.cast(pa.int64()).drop_null().to_numpy()
            has_far_years = has_far_years or not agree.all()
            has_digits = has_digits or bool((nanoseconds[agree] % 1000).any())
    return has_digits, has_far_years
