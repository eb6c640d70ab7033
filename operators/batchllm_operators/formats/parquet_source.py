"""Parquet: columns told by footers; timestamps of 96 bits in the unit that holds their values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import and_
from typing import Literal

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.columns.column_types import leaves, with_leaves
from batchllm_operators.errors import TerminalError
from batchllm_operators.formats.input_objects import FoundInput
from batchllm_operators.formats.object_rows import ObjectColumns, ReadRows, Wanted
from batchllm_operators.formats.source import BATCH_ROWS
from batchllm_operators.formats.tables import ColumnarSource, TableReader
from batchllm_operators.specs.source import SourceSpec

Int96Unit = Literal["us", "ns"]
"""Unit in which timestamps of 96 bits are read: no unit of 64 bits holds both their digits and their years."""
_UNITS: tuple[Int96Unit, Int96Unit] = ("us", "ns")


@dataclass(frozen=True)
class Footer(ObjectColumns):
    """What the end of a Parquet object tells; timestamps of 96 bits in nanoseconds, as Arrow reads them unasked.

    Attributes:
        int96: columns that hold timestamps of 96 bits.
        group_rows: rows of each row group, in order.
    """

    int96: frozenset[str] = frozenset()
    group_rows: tuple[int, ...] = ()

    @cached_property
    def group_starts(self) -> Int64s:
        """int64 [row groups], the number of the first row of each in the object."""
        return np.cumsum([0, *self.group_rows[:-1]], dtype=np.int64)

    def has_columns_of(self, other: ObjectColumns) -> bool:
        """Whether both have the same columns, with the same of them in 96 bits."""
        return super().has_columns_of(other) and isinstance(other, Footer) and self.int96 == other.int96


class ParquetSource(ColumnarSource):
    """Rows of Parquet objects.

    Args:
        spec: the source part of the job.
        found: the objects.
        reader: of single objects; tells a `Footer` of each.
    """

    def __init__(self, spec: SourceSpec, found: FoundInput, reader: TableReader) -> None:
        super().__init__(spec, found, reader)
        self._units: dict[str, Int96Unit] = {}

    def _type_in(self, path: str, name: str, wanted: pa.DataType | None = None) -> pa.DataType:
        """As told, but for timestamps of 96 bits: in microseconds as long as the type of their column is not known."""
        kind = super()._type_in(path, name)
        if name not in self._int96_in(path):
            return kind
        return _with_unit(kind, "us" if wanted is None else _unit_of(wanted))

    def _int96_in(self, path: str) -> frozenset[str]:
        """Columns of an object that hold timestamps of 96 bits."""
        told = self._told[path]
        return told.int96 if isinstance(told, Footer) else frozenset()

    def _settle(self, names: Sequence[str]) -> None:
        self._settle_units([name for name in names if name not in self._units and self._unit_is_open(name)])

    def _unit_is_open(self, name: str) -> bool:
        """Whether the values of a column say, in the end, in which unit its timestamps of 96 bits are read."""
        if name in self._pinned and _unit_of(self._pinned[name]) == "us":
            return False
        return any(name in self._int96_in(path) for path in self._told)

    def _settle_units(self, names: list[str]) -> None:
        """Find the unit that each of these columns of 96 bits needs, by a look at its values.

        Raises:
            TerminalError: a value has more digits than microseconds, and another of its column (or the type that the
                job names) has no nanoseconds.
        """
        with_digits, with_far_years = self._int96_needs(names)
        finer = self._over_all_objects(super()._type_in) if with_digits else {}
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
        for path in self._told:
            present = [name for name in names if name in self._int96_in(path)]
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

    def _scan(self, path: str, fields: Sequence[pa.Field], wanted: Wanted | None = None) -> Iterator[ReadRows]:
        """Batches of an object with these columns, timestamps of 96 bits in the unit of their field.

        Row groups without a wanted row are left out.
        """
        groups = None if wanted is None else self._groups_with(path, wanted)
        if groups is None:
            yield from map(ReadRows, self._scan_by_unit(path, fields, None))
            return
        starts = self._footer(path).group_starts
        for stretch in _stretches(groups):
            first_row = int(starts[stretch[0]])
            for batch in self._scan_by_unit(path, fields, stretch):
                yield ReadRows(batch, first_row=first_row)
                first_row += batch.num_rows

    def _groups_with(self, path: str, wanted: Wanted) -> list[int] | None:
        """Row groups of an object that may have wanted rows, in order; None: all."""
        if wanted.rows is not None:
            places = np.searchsorted(self._footer(path).group_starts, wanted.rows, side="right") - 1
            return [int(place) for place in np.unique(places)]
        if wanted.row_filter is None:
            return None
        schema = self._footer(path).schema
        told = [part for part in wanted.row_filter.condition.parts() if self._is_told_by_statistics(path, part.columns)]
        if not told:
            return None
        return self.store.parquet_row_groups(path, reduce(and_, (part.expression(schema) for part in told)))

    def _is_told_by_statistics(self, path: str, columns: Collection[str]) -> bool:
        """Whether an object has these columns itself, once each, in the types in which they are read."""
        told = self._footer(path)
        return all(
            name in told.types
            and name not in self._partitions.schema.names
            and name not in told.int96 | told.ambiguous
            and told.schema.field(name).type.equals(self._columns[name].kind)
            for name in columns
        )

    def _footer(self, path: str) -> Footer:
        told = self._told[path]
        if not isinstance(told, Footer):
            raise TypeError(f"{path}: expected a footer, got {type(told).__name__}")
        return told

    def _scan_by_unit(
        self, path: str, fields: Sequence[pa.Field], groups: Sequence[int] | None
    ) -> Iterator[pa.RecordBatch]:
        names = [field.name for field in fields]
        units = {field.name: _unit_of(field.type) for field in fields if field.name in self._int96_in(path)}
        if len(set(units.values())) < 2:
            unit = next(iter(units.values()), "us")
            yield from self.store.scan_parquet(path, names, BATCH_ROWS, int96_unit=unit, row_groups=groups)
            return
        fine_names = [name for name, unit in units.items() if unit == "ns"]
        coarse_names = [name for name in names if name not in fine_names]
        parts = zip(_UNITS, (coarse_names, fine_names), strict=True)
        scans = [
            self.store.scan_parquet(path, part, BATCH_ROWS, int96_unit=unit, row_groups=groups) for unit, part in parts
        ]
        for coarse, fine in zip(*scans, strict=True):
            columns = [(fine if name in fine_names else coarse).column(name) for name in names]
            yield pa.RecordBatch.from_arrays(columns, names=names)


def _stretches(groups: Sequence[int]) -> list[list[int]]:
    """Numbers in order, cut where one is left out."""
    cuts = np.flatnonzero(np.diff(groups) > 1) + 1
    return [piece.tolist() for piece in np.split(np.asarray(groups, np.int64), cuts) if len(piece)]


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
