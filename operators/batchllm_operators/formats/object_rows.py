"""What a reader tells of one object and gives of its rows, and which of them it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.columns.column_types import plain
from batchllm_operators.formats.row_filter import RowFilter


@dataclasses.dataclass(frozen=True)
class ObjectColumns:
    """What an object tells before its rows are read.

    Attributes:
        schema: its columns; a name may stand there twice, and is refused where it is used.
        rows: number of its rows; None where only reading them tells.
    """

    schema: pa.Schema
    rows: int | None = None

    @cached_property
    def types(self) -> dict[str, pa.DataType]:
        """Column -> type, encodings (dictionaries, views) left out."""
        return {field.name: plain(field.type) for field in self.schema}

    @cached_property
    def ambiguous(self) -> frozenset[str]:
        """Names that more than one column has."""
        names = self.schema.names
        return frozenset(name for name in names if names.count(name) > 1)

    def has_columns_of(self, other: ObjectColumns) -> bool:
        """Whether both have the same columns, as most objects of a folder do."""
        return (self.types, self.ambiguous) == (other.types, other.ambiguous)


@dataclasses.dataclass(frozen=True)
class ReadRows:
    """Consecutive rows of one object.

    Attributes:
        rows: the rows.
        faults: number of a row in this batch, from 0 -> why it could not be read, with its place in the object.
        first_row: number of the first row in the object, where rows before it were left out; None: it follows the last.
    """

    rows: pa.RecordBatch
    faults: Mapping[int, str] = dataclasses.field(default_factory=dict)
    first_row: int | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which rows of an object are wanted: stretches without one may be left out.

    Attributes:
        row_filter: those that it takes; None: those of `rows`.
        rows: numbers in the object, in order.
    """

    row_filter: RowFilter | None = None
    rows: Int64s | None = None

    def of_rows(self, first: int, last: int) -> Wanted:
        """The same for an object whose rows have these numbers in the source, `last` not included."""
        if self.rows is None:
            return self
        start, end = np.searchsorted(self.rows, [first, last])
        return Wanted(rows=self.rows[start:end] - first)
