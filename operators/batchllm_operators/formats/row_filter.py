"""`source.filter`: which rows of the input are taken."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.columns.json_schema import JSON_TEXT, json_schema
from batchllm_operators.columns.sql_filter import SqlFilter, SqlFilterError
from batchllm_operators.errors import TerminalError
from batchllm_operators.specs.source import SourceSpec


class RowFilter:
    """The filter of a source.

    Args:
        spec: of the source; has a filter.
    """

    def __init__(self, spec: SourceSpec) -> None:
        self.condition = SqlFilter(spec.filter or "")
        self._uri = spec.uri
        self._types = spec.types()

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that it looks at."""
        return self.condition.columns

    def taken(self, rows: pa.Table | list[dict[str, Any]], faults: Collection[int], first_row: int) -> Int64s:
        """Which rows of a batch are taken; a row that cannot be read is, so that its error is not lost.

        Args:
            rows: as a table or as records.
            faults: offsets of rows that could not be read.
            first_row: number of the first row, for messages.

        Returns:
            int64, offsets of the rows, in order.

        Raises:
            TerminalError: the condition does not go with the values.
        """
        try:
            holds = self.condition.holds(self._table(rows, faults) if isinstance(rows, list) else rows)
        except SqlFilterError as error:
            where = f"rows {first_row:,} to {first_row + len(rows) - 1:,}"
            raise TerminalError(
                f"source.filter: {error}, in {where}; `source.schema` can name the type of a column", uri=self._uri
            ) from error
        holds[list(faults)] = True
        return np.flatnonzero(holds)

    def check(self, schema: pa.Schema) -> None:
        """Look whether the condition goes with columns of these types.

        Raises:
            TerminalError: it does not.
        """
        try:
            self.condition.expression(schema)
        except SqlFilterError as error:
            raise TerminalError(f"source.filter: {error}", uri=self._uri) from error

    def _table(self, records: list[dict[str, Any]], faults: Collection[int]) -> pa.Table:
        """The columns of the condition from records, in the types that their values have; null in rows at fault."""
        columns = {}
        readable = [{} if offset in faults else record for offset, record in enumerate(records)]
        for field in json_schema(readable, sorted(self.columns)):
            values = [record.get(field.name) for record in readable]
            kind = self._types.get(field.name, field.type)
            if kind.equals(JSON_TEXT):
                raise SqlFilterError(f"column {field.name!r} has values of more than one type")
            columns[field.name] = pa.array(values, kind)
        return pa.table(columns)
