"""The order of the fields in each prompt of kind `fields`, where their order does not matter to the question.

After Liu et al., "Optimizing LLM Queries in Relational Data Analytics": rows share a prompt's beginning when their
first fields have the same values, so rows with a value in common put it first. For a set of rows, values are taken
greedily by (rows - 1) x length^2, where the lengths of all fields that are constant among these rows count: these are
the functional dependencies of the value, seen in the data itself. The rows of a value put those fields first, and go
on with their other fields among themselves; the remaining rows go on with all fields. Every level of that touches a
row once for each pair of fields, so the work is linear in the rows.

Orders with length^1 and with one order for all rows are tried as well, and the one that shares most is taken, so the
result is never worse than the fields as given.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Bools, Floats, Int8s, Int32s, Int64s, UInt64s
from batchllm_operators.columns.compiled import compiled
from batchllm_operators.specs.source import MOST_FIELDS

_HASH_OF_NULL = 0


@dataclass(frozen=True, slots=True)
class FieldTable:
    """N rows of F fields, their values as numbers.

    Attributes:
        values: int64 [N, F], number of each value; equal numbers are equal values of the same field.
        lengths: int64 [values], length of each value with its field's name, in any unit.
    """

    values: Int64s
    lengths: Int64s


@dataclass(frozen=True, slots=True)
class FieldOrder:
    """The chosen order.

    Attributes:
        fields: int8 [N, F], the fields of each row in the order of its prompt.
        hit_rate: share of all lengths that a row shares with the one before it, when rows stand in the order of a
            plan.
        hit_rate_as_given: the same with the fields as given.
        hit_rate_unsorted: the same with fields and rows as given.
    """

    fields: Int8s
    hit_rate: float
    hit_rate_as_given: float
    hit_rate_unsorted: float


class FieldEncoder:
    """Numbers the values of field columns, batch by batch; holds 12 bytes a value of a row, and no text.

    Values are told apart by 64-bit hashes: two that collide would cost a little sharing, and change no prompt.

    Args:
        names: of the fields; their lengths count with every value.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not 1 <= len(names) <= MOST_FIELDS:
            raise ValueError(f"expected 1 to {MOST_FIELDS} fields, got {len(names)}")
        self._names = list(names)
        self._hashes: list[list[UInt64s]] = [[np.zeros(0, dtype=np.uint64)] for _ in names]
        self._lengths: list[list[Int32s]] = [[np.zeros(0, dtype=np.int32)] for _ in names]

    def add(self, columns: Sequence[pa.Array]) -> None:
        """Add rows: one array of strings for each field, of like length."""
        for place, column in enumerate(columns):
            encoded = column.dictionary_encode()
            texts = encoded.dictionary.to_pylist()
            codes = encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
            hashes = np.array([*map(_hash, texts), _HASH_OF_NULL], dtype=np.uint64)
            lengths = np.array([*map(len, texts), 0], dtype=np.int32)
            self._hashes[place].append(hashes[codes])
            self._lengths[place].append(lengths[codes] + np.int32(len(self._names[place])))

    def table(self) -> FieldTable:
        """All rows added so far."""
        columns = []
        lengths = [np.zeros(0, dtype=np.int64)]
        numbers = 0
        for hashes, column_lengths in zip(self._hashes, self._lengths, strict=True):
            _, first, value = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
            columns.append(numbers + value.astype(np.int64))
            lengths.append(np.concatenate(column_lengths)[first].astype(np.int64))
            numbers += len(first)
        return FieldTable(np.stack(columns, axis=1), np.concatenate(lengths))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def choose_field_order(table: FieldTable) -> FieldOrder:
    """Choose the order of the fields of each row that lets a plan share most.

    Raises:
        ValueError: more than `MOST_FIELDS` fields.
    """
    rows, fields = table.values.shape
    if fields > MOST_FIELDS:
        raise ValueError(f"expected at most {MOST_FIELDS} fields, got {fields}")
    as_given = np.tile(np.arange(fields, dtype=np.int8), (rows, 1))
    best, shared_as_given = as_given, _shared_when_sorted(table, as_given)
    shared = shared_as_given
    for candidate in _candidates(table):
        candidate_shared = _shared_when_sorted(table, candidate)
        if candidate_shared > shared:
            best, shared = candidate, candidate_shared
    total = max(int(table.lengths[table.values].sum()), 1)
    unsorted = _shared_with_row_before(table.values, table.lengths)
    return FieldOrder(best, shared / total, shared_as_given / total, unsorted / total)


def _candidates(table: FieldTable) -> Iterator[Int8s]:
    yield np.tile(_by_statistics(table), (len(table.values), 1))
    lengths = table.lengths.astype(np.float64)
    for power in (2.0, 1.0):
        yield _greedy(table.values, lengths**power, len(lengths))


def _by_statistics(table: FieldTable) -> Int8s:
    """One order for all rows: by the length that a field's values repeat, the most first."""
    present, count = np.unique(table.values, return_counts=True)
    repeats = np.zeros(len(table.lengths), dtype=np.float64)
    repeats[present] = count - 1
    saved = (repeats * table.lengths)[table.values] / np.maximum(repeats + 1, 1)[table.values]
    return np.argsort(-saved.sum(axis=0), kind="stable").astype(np.int8)


def _shared_when_sorted(table: FieldTable, order: Int8s) -> int:
    """Length that rows share with the one before, when all are sorted so that shared beginnings are one range."""
    sequence = np.take_along_axis(table.values, order.astype(np.int64), axis=1)
    return _shared_with_row_before(sequence[np.lexsort(sequence.T[::-1])], table.lengths)


def _shared_with_row_before(values: Int64s, lengths: Int64s) -> int:
    agree: Bools = np.logical_and.accumulate(values[1:] == values[:-1], axis=1)
    return int((lengths[values[1:]] * agree).sum())


class _Values(NamedTuple):
    """What is known of the values among the rows at hand; arrays by value, or by (field, row)."""

    rows_left: Int64s
    """Rows that have it and stand in no group yet."""
    rows: Int64s
    """Rows that have it."""
    head: Int64s
    """The last row that has it; -1: none."""
    before: Int64s
    """[F, N]: the row before that has the same value in this field; -1: none."""
    constant: Int64s
    """Fields that are the same in all its rows, as bits."""


@compiled
def _greedy(table: Int64s, weight: Floats, distinct: int) -> Int8s:
    """Field order of each row; `weight` is what sharing a value is worth to one row."""
    rows, fields = table.shape
    order = np.zeros((rows, fields), dtype=np.int8)
    placed = np.zeros(rows, dtype=np.int32)
    members = np.arange(rows)
    grouped = np.empty(rows, dtype=np.int64)
    taken = np.zeros(rows, dtype=np.bool_)
    values = _Values(
        np.zeros(distinct, dtype=np.int64),
        np.zeros(distinct, dtype=np.int64),
        np.full(distinct, -1, dtype=np.int64),
        np.empty((fields, rows), dtype=np.int64),
        np.zeros(distinct, dtype=np.int64),
    )
    ranges = [(0, rows, (1 << fields) - 1)]
    while len(ranges) > 0:
        low, high, free = ranges.pop()
        if free == 0:
            continue
        here = members[low:high]
        taken[here] = False
        candidates = _look_at(table, here, free, weight, values)
        filled = low
        while len(candidates) > 0:
            worth, value, field = heapq.heappop(candidates)
            now = -_worth(table, weight, values, value)
            if now > worth:
                # Rows have gone to other groups since: it waits for its turn.
                if values.rows_left[value] > 1:
                    heapq.heappush(candidates, (now, value, field))
                continue
            begin = filled
            filled = _take_rows(table, value, field, free, values, taken, grouped, filled)
            for row in grouped[begin:filled]:
                _place(order, placed, row, values.constant[value], table, weight, values.rows)
            ranges.append((begin, filled, free & ~values.constant[value]))
        for row in here:
            for field in range(fields):
                values.head[table[row, field]] = -1
            if not taken[row]:
                _place(order, placed, row, free, table, weight, values.rows)
                grouped[filled] = row
                filled += 1
        members[low:high] = grouped[low:high]
    return order


@compiled
def _look_at(table: Int64s, here: Int64s, free: int, weight: Floats, values: _Values) -> list[tuple[float, int, int]]:
    """Count the values of some rows in the free fields; returns a heap of (-worth, value, field) of the shared ones."""
    fields = table.shape[1]
    for row in here:
        for field in range(fields):
            value = table[row, field]
            if free >> field & 1 == 0:
                continue
            first = values.head[value]
            if first < 0:
                values.rows[value] = 0
                values.constant[value] = free
            else:
                for other in range(fields):
                    if table[row, other] != table[first, other]:
                        values.constant[value] &= ~(1 << other)
            values.before[field, row] = first
            values.head[value] = row
            values.rows[value] += 1
            values.rows_left[value] = values.rows[value]
    heap = [(0.0, 0, 0)]
    for row in here:
        for field in range(fields):
            value = table[row, field]
            if free >> field & 1 and values.head[value] == row and values.rows[value] > 1:
                heap.append((-_worth(table, weight, values, value), value, field))
    heap = heap[1:]
    heapq.heapify(heap)
    return heap


@compiled
def _take_rows(
    table: Int64s, value: int, field: int, free: int, values: _Values, taken: Bools, grouped: Int64s, filled: int
) -> int:
    """Move the rows of a value that stand in no group into one of their own; returns where it ends."""
    row = values.head[value]
    while row >= 0:
        if not taken[row]:
            taken[row] = True
            grouped[filled] = row
            filled += 1
            for other in range(table.shape[1]):
                if free >> other & 1:
                    values.rows_left[table[row, other]] -= 1
        row = values.before[field, row]
    return filled


@compiled
def _worth(table: Int64s, weight: Floats, values: _Values, value: int) -> float:
    """What it is worth to put a value, and all that is constant with it, first."""
    total = 0.0
    for field in range(table.shape[1]):
        if values.constant[value] >> field & 1:
            total += weight[table[values.head[value], field]]
    return total * float(values.rows_left[value] - 1)


@compiled
def _place(
    order: Int8s, placed: Int32s, row: int, chosen: int, table: Int64s, weight: Floats, rows_with: Int64s
) -> None:
    """Put the chosen fields next in the row's order, those first whose values other rows share most."""
    begin = placed[row]
    for field in range(table.shape[1]):
        if chosen >> field & 1 == 0:
            continue
        mine = weight[table[row, field]] * (rows_with[table[row, field]] - 1)
        place = placed[row]
        while place > begin:
            other = table[row, order[row, place - 1]]
            if weight[other] * (rows_with[other] - 1) >= mine:
                break
            order[row, place] = order[row, place - 1]
            place -= 1
        order[row, place] = field
        placed[row] += 1
