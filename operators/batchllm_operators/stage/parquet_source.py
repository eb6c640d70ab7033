"""Rows of Parquet objects."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import orjson
import pyarrow as pa

from batchllm_operators.errors import TerminalError
from batchllm_operators.specs.source import SourceSpec
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
from batchllm_operators.store import Store

Int96Unit = Literal["us", "ns"]
"""Unit in which timestamps of 96 bits are read: no unit of 64 bits holds both their digits and their years."""
_UNITS: tuple[Int96Unit, Int96Unit] = ("us", "ns")
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
        self._units: dict[str, Int96Unit] = {}
        self._columns = self._over_all_objects("us")
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
        for one in self.objects:
            present = [field for field in schema if field.name in self._footers[one.path].types]
            waiting: list[pa.Table] = []
            waiting_rows = 0
            for batch in self._scan(one.path, present):
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
        """Schema of these columns, whose values all fit into it; values of no other column are looked at."""
        self._refuse_conflicts(names)
        self._settle_units([name for name in names if name not in self._units and self._unit_is_open(name)])
        schema = pa.schema([(name, self._columns[name].kind) for name in names])
        self._refuse_values_that_do_not_fit(schema)
        return schema

    def _settle_units(self, names: list[str]) -> None:
        """Find the unit that each of these columns of 96 bits needs, by a look at its values.

        Raises:
            TerminalError: a value has more digits than microseconds, and another of its column (or the type that the
                job names) has no nanoseconds.
        """
        with_digits, with_far_years = self._int96_needs(names)
        finer = self._over_all_objects("ns") if with_digits else {}
        for name in names:
            if name in with_digits and name not in self._pinned:
                self._columns[name] = finer[name]
            self._refuse_conflicts([name])
            self._units[name] = _unit_of(self._columns[name].kind)
            if name in with_far_years and self._units[name] == "ns":
                column = self._columns[name]
                raise TerminalError(
                    f"source: column {name!r} has timestamps of 96 bits with nanoseconds, beside a year that"
                    f" nanoseconds do not reach ({name!r} in {with_far_years[name]}): name the type in"
                    f" source.schema to read them without, for example {{{name}: timestamp[us]}}",
                    uri=self.store.uri_of(with_digits.get(name, column.path)),
                )

    def _int96_needs(self, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Columns with digits that only nanoseconds have, and with years that only microseconds reach.

        Returns:
            Twice column -> path of the first object that shows it.
        """
        with_digits: dict[str, str] = {}
        with_far_years: dict[str, str] = {}
        for path, footer in self._footers.items():
            present = [name for name in names if name in footer.int96]
            if not present:
                continue
            scans = [self.store.scan_parquet(path, present, BATCH_ROWS, int96_unit=unit) for unit in _UNITS]
            for coarse, fine in zip(*scans, strict=True):
                for name in present:
                    has_digits, has_far_years = _needs(fine.column(name), coarse.column(name))
                    if has_digits:
                        with_digits.setdefault(name, path)
                    if has_far_years:
                        with_far_years.setdefault(name, path)
        return with_digits, with_far_years

    def _scan(self, path: str, fields: list[pa.Field]) -> Iterator[pa.RecordBatch]:
        """Batches of an object with these columns, timestamps of 96 bits in the unit of their field."""
        names = [field.name for field in fields]
        units = {field.name: _unit_of(field.type) for field in fields if field.name in self._footers[path].int96}
        if len(set(units.values())) < 2:
            unit = next(iter(units.values()), "us")
            yield from self.store.scan_parquet(path, names, BATCH_ROWS, int96_unit=unit)
            return
        fine_names = [name for name, unit in units.items() if unit == "ns"]
        coarse_names = [name for name in names if name not in fine_names]
        parts = zip(_UNITS, (coarse_names, fine_names), strict=True)
        scans = [self.store.scan_parquet(path, part, BATCH_ROWS, int96_unit=unit) for unit, part in parts]
        for coarse, fine in zip(*scans, strict=True):
            columns = [(fine if name in fine_names else coarse).column(name) for name in names]
            yield pa.RecordBatch.from_arrays(columns, names=names)

    def _unit_is_open(self, name: str) -> bool:
        """Whether the values of a column say, in the end, in which unit its timestamps of 96 bits are read."""
        if name in self._pinned and _unit_of(self._pinned[name]) == "us":
            return False
        return any(name in footer.int96 for footer in self._footers.values())

    def _refuse_conflicts(self, names: Collection[str]) -> None:
        for name in names:
            conflict = self._columns[name].conflict
            if conflict is not None:
                raise conflict

    def _refuse_values_that_do_not_fit(self, schema: pa.Schema) -> None:
        """Look at the values of columns whose type differs between objects, before any other work is done."""
        unseen = pa.schema([field for field in schema if field.name not in self._fitting])
        for path, footer in self._footers.items():
            doubtful = [
                field
                for field in unseen
                if field.name in footer.types
                and not always_fits(footer.type_of(field.name, _unit_of(field.type)), field.type)
            ]
            if not doubtful:
                continue
            for batch in self._scan(path, doubtful):
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


def _unit_of(kind: pa.DataType) -> Int96Unit:
    """The unit in which timestamps of 96 bits are read for a column of this type."""
    return "us" if _with_unit(kind, "us").equals(kind) else "ns"


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
