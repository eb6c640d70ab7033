"""What a source of input rows offers to staging and to merge, whatever the format of its objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchllm_operators.batch_sizes import ROWS_AT_A_TIME
from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.columns.arrow_values import python_rows
from batchllm_operators.errors import RowError, RowErrorCode, TerminalError
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.row_filter import RowFilter
from batchllm_operators.records import InputObject
from batchllm_operators.specs.source import SourceSpec

BATCH_ROWS = ROWS_AT_A_TIME
"""Most rows of a batch."""

ROW_JSON = pa.field("row", pa.large_string(), nullable=False)
"""Column of `Source.json_rows`."""
_NO_COLUMN = pa.field("", pa.null())


@dataclass(frozen=True)
class RowBatch:
    """Consecutive input rows.

    Attributes:
        first_row: index of the first row over all rows of the source that `source.filter` takes.
        rows: the rows, as an Arrow table or as records.
        faults: row offset -> why the row could not be read; such a row is an empty record.
        schema: types of the columns that go to the sink, as this batch shows them; of JSONL by `json_schema`.
        field_order: int8 [rows, fields], for a prompt of kind `fields`: its columns by number, in the order of each
            row's prompt; None: as given.
        source_rows: int64 [rows], where the source has a filter: the numbers of the rows over all rows of its objects.
    """

    first_row: int
    rows: pa.Table | list[dict[str, Any]]
    schema: pa.Schema
    faults: dict[int, RowError] = field(default_factory=dict)
    field_order: npt.NDArray[np.int8] | None = None
    source_rows: Int64s | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def slice(self, start: int, rows: int) -> RowBatch:
        """Some consecutive rows of this batch, as `pyarrow.Table.slice`."""
        table = self.rows[start : start + rows] if isinstance(self.rows, list) else self.rows.slice(start, rows)
        faults = {offset - start: fault for offset, fault in self.faults.items() if 0 <= offset - start < rows}
        order = None if self.field_order is None else self.field_order[start : start + rows]
        numbers = None if self.source_rows is None else self.source_rows[start : start + rows]
        return RowBatch(self.first_row + start, table, self.schema, faults, order, numbers)

    def taken(self, offsets: Int64s, first_row: int) -> RowBatch:
        """Some rows of this batch, told by their offsets in it, which become those from `first_row` on."""
        places = offsets.tolist()
        rows = [self.rows[place] for place in places] if isinstance(self.rows, list) else self.rows.take(offsets)
        faults = {new: self.faults[old] for new, old in enumerate(places) if old in self.faults}
        return RowBatch(first_row, rows, self.schema, faults, source_rows=self.first_row + offsets)

    def field_order_of(self, offset: int) -> list[int] | None:
        """Numbers of the fields of one row, in the order of its prompt; None: as given."""
        return None if self.field_order is None else self.field_order[offset].tolist()

    def records(self) -> list[dict[str, Any]]:
        """The rows as column name -> Python value, see `readable`."""
        return self.readable()[0]

    def readable(self) -> tuple[list[dict[str, Any]], dict[int, RowError]]:
        """The rows as column name -> Python value, and row offset -> why a row cannot be read.

        A row is at fault where a column that was asked for holds text that is no UTF-8; binary columns count as text.
        """
        if isinstance(self.rows, list):
            return self.rows, dict(self.faults)
        records, reasons = python_rows(self.rows)
        faults = {offset: RowError(RowErrorCode.INVALID_ROW, reason) for offset, reason in reasons.items()}
        return records, faults | self.faults


_Rows = TypeVar("_Rows", RowBatch, pa.Table)

NumberedTable: TypeAlias = tuple[int, pa.Table]
"""Consecutive rows, and the number of the first over all rows of the source's objects."""


class Source(ABC):
    """The rows of all objects that a source URI names, in the order of the objects' paths.

    `batches`, `tables` and `json_rows` give the same rows in the same order, each time they are called: staging reads
    rows as batches, perhaps twice, and merge reads them again as tables or JSON and puts answers beside them by their
    number. Only `batches` looks at `source.filter`: it tells the numbers of the rows it took, by which the others find
    them. What is wrong with one row is data (`RowBatch.faults`); what is wrong with an object is a `TerminalError`
    that names it; where the store does not answer it is a `TransientError`, and the step is tried again.

    Attributes:
        objects: fingerprint of the input.
        left_out: objects beside them that look like data and are not read, each with the reason.
        has_columns: whether `columns` is known; not so for JSONL without one readable row so far.
        unites_keys: whether a struct has the keys of all rows, null where a row has none, as in Arrow; in JSON each
            object has its own.
        rows: number of rows; None where only reading them tells (JSONL, or a filter).
    """

    has_columns = True
    unites_keys = True
    rows: int | None = None

    def __init__(self, spec: SourceSpec, found: FoundInput) -> None:
        self.spec = spec
        self.store = found.store
        self.objects = list(found.objects)
        self.left_out = found.left_out
        self._find_again = found.again
        self._filter = None if spec.filter is None else RowFilter(spec)

    def look_again(self) -> list[InputObject]:
        """What `objects` would be if the source were opened now."""
        return list(self._find_again().objects)

    def object_uris(self) -> list[str]:
        """URIs of the input objects."""
        return [self.store.uri_of(one.path) for one in self.objects]

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns; of JSONL, the keys of the rows read so far."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Schema of the columns that go to the sink, as far as it is known before all rows are read.

        Of Parquet all of it, and that all values fit has been looked at where that depends on them; of JSONL none.

        Raises:
            TerminalError: `source.columns` names a column that does not exist, or values do not fit.
        """

    def find_all_columns(self, progress: Callable[[int], None]) -> None:  # noqa: B027 - most formats know them
        """Make `columns` those of all rows; JSONL is read through for it, once.

        Args:
            progress: called with the number of rows read so far.
        """

    def batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        """All rows that the filter takes, or the first `source.limit` of them, in batches of at most `BATCH_ROWS`.

        Args:
            columns: those to read; others may be there too.

        Raises:
            TerminalError: the filter does not go with the values of its columns.
        """
        if self._filter is None:
            return _first_rows(self._all_batches(columns), self.spec.limit)
        return _first_rows(self._filtered_batches(columns, self._filter), self.spec.limit)

    def tables(self, schema: pa.Schema, rows: Int64s | None = None) -> Iterator[pa.Table]:
        """The same rows again, in batches, as tables of this schema (what staging found).

        Without columns, the tables have one column of nulls in their place, because a table forgets its rows with its
        last column.

        Args:
            schema: of the tables.
            rows: `RowBatch.source_rows` of all batches, where the source has a filter.
        """
        if rows is None:
            return _first_rows(self._all_tables(schema), self.spec.limit)
        return _rows_of(self._tables_with(schema, rows), rows)

    def json_rows(self, schema: pa.Schema, rows: Int64s | None = None) -> Iterator[pa.Table]:
        """The same rows again, in batches, each with its columns of this schema as one JSON object (`ROW_JSON`)."""
        if rows is None:
            return _first_rows(self._all_json_rows(schema), self.spec.limit)
        return _rows_of(self._json_rows_with(schema, rows), rows)

    @abstractmethod
    def sink_schema(self, seen: pa.Schema) -> pa.Schema:
        """Schema of the carried columns in the output.

        Args:
            seen: `schema`, united with those of all batches.
        """

    @abstractmethod
    def _all_batches(self, columns: Collection[str]) -> Iterator[RowBatch]: ...

    @abstractmethod
    def _all_tables(self, schema: pa.Schema) -> Iterator[pa.Table]: ...

    @abstractmethod
    def _all_json_rows(self, schema: pa.Schema) -> Iterator[pa.Table]: ...

    def _filterable_batches(self, columns: Collection[str]) -> Iterator[RowBatch]:
        """As `_all_batches`, but stretches of rows of which the filter surely takes none may be left out."""
        return self._all_batches(columns)

    def _tables_with(self, schema: pa.Schema, rows: Int64s) -> Iterator[NumberedTable]:
        """Tables that have these rows at least, each with the number of its first row."""
        del rows
        return _numbered(self._all_tables(schema))

    def _json_rows_with(self, schema: pa.Schema, rows: Int64s) -> Iterator[NumberedTable]:
        """As `_tables_with`, of JSON objects."""
        del rows
        return _numbered(self._all_json_rows(schema))

    def _filtered_batches(self, columns: Collection[str], row_filter: RowFilter) -> Iterator[RowBatch]:
        first_row = 0
        for batch in self._filterable_batches({*columns, *row_filter.columns}):
            offsets = row_filter.taken(batch.rows, batch.faults, batch.first_row)
            if len(offsets):
                yield batch.taken(offsets, first_row)
                first_row += len(offsets)

    def check_filter(self) -> None:
        """Look whether the filter goes with the columns, as far as that can be told without reading rows.

        Raises:
            TerminalError: it does not.
        """
        if self._filter is not None:
            self.require_columns(self._filter.columns, "source.filter")

    def require_columns(self, names: Collection[str], field_name: str) -> None:
        """Refuse a part of the job that names columns which do not exist.

        Raises:
            TerminalError: lists the missing names and the columns there are.
        """
        missing = self.missing(names)
        if missing and self.has_columns:
            raise TerminalError(
                f"{field_name}: no such column: {', '.join(missing)}; columns: {', '.join(self.columns) or 'none'}",
                uri=self.spec.uri,
            )

    def missing(self, names: Collection[str]) -> list[str]:
        """Which of these are no columns of any row, sorted."""
        return sorted(set(names) - set(self.columns))

    def carry_only(self, columns: Sequence[str]) -> None:
        """Let just these columns go to the sink, in place of those of `source.columns`."""
        self.spec = self.spec.model_copy(update={"columns": list(columns)})

    def carried(self) -> list[str]:
        """Names of the columns that go to the sink; of JSONL without a selection, those of the rows read so far."""
        if self.spec.columns is None:
            return self.columns
        self.require_columns(self.spec.columns, "source.columns")
        return self.spec.columns


def _first_rows(batches: Iterator[_Rows], limit: int | None) -> Iterator[_Rows]:
    """The batches up to a number of rows; not one more is read."""
    if limit is None:
        yield from batches
        return
    left = limit
    while left > 0 and (batch := next(batches, None)) is not None:
        yield batch if len(batch) <= left else batch.slice(0, left)
        left -= len(batch)


def _numbered(tables: Iterator[pa.Table]) -> Iterator[NumberedTable]:
    first_row = 0
    for table in tables:
        yield first_row, table
        first_row += len(table)


def _rows_of(tables: Iterator[NumberedTable], rows: Int64s) -> Iterator[pa.Table]:
    """Just these rows of the tables; nothing behind the last of them is read."""
    done = 0
    while done < len(rows) and (found := next(tables, None)) is not None:
        first_row, table = found
        end = int(np.searchsorted(rows, first_row + len(table)))
        if end > done:
            yield table.take(rows[done:end] - first_row)
        done = max(done, end)


def rows_only(rows: int) -> pa.Table:
    """A table of so many rows that stands for one without columns."""
    return pa.table([pa.nulls(rows)], schema=pa.schema([_NO_COLUMN]))
