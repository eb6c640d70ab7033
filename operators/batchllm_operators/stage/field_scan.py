"""The order of the fields of every row, chosen from the whole input before any prompt is rendered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pyarrow as pa

from batchllm_operators.columns.arrays import Int8s
from batchllm_operators.columns.arrow_values import python_rows
from batchllm_operators.formats import RowBatch, Source
from batchllm_operators.stage.faults import RowFaultError
from batchllm_operators.stage.field_order import FieldEncoder, FieldOrder, choose_field_order
from batchllm_operators.stage.field_text import plain_text


def scan_fields(source: Source, columns: Sequence[str], progress: Callable[[int], None]) -> FieldOrder:
    """Read the columns of all rows once, batch by batch, and choose the order of the fields of each row.

    Memory: 12 bytes a value while reading, about 40 while choosing; no text is kept.

    Args:
        source: the input.
        columns: the fields, in the order of the job.
        progress: called with the number of rows read so far.

    Raises:
        TransientError: the store does not answer.
    """
    encoder = FieldEncoder(columns)
    for batch in source.batches(columns):
        encoder.add([_texts(batch, name) for name in columns])
        progress(batch.first_row + len(batch))
    return choose_field_order(encoder.table())


def with_field_order(batches: Iterator[RowBatch], fields: Int8s) -> Iterator[RowBatch]:
    """The batches, each with its part of the order of the fields of all rows (int8 [N, F])."""
    for batch in batches:
        yield replace(batch, field_order=fields[batch.first_row : batch.first_row + len(batch)])


def _texts(batch: RowBatch, name: str) -> pa.Array:
    """The values of a column as texts; null too where a value has no text, which makes its row an error later."""
    if isinstance(batch.rows, list):
        records = batch.rows
    else:
        column = batch.rows[name].combine_chunks()
        if pa.types.is_string(column.type) and _is_valid(column):
            return column
        records, _ = python_rows(batch.rows.select([name]))
    return pa.array([_text_or_null(name, record.get(name)) for record in records], pa.string())


def _is_valid(column: pa.Array) -> bool:
    """Whether all texts are UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _text_or_null(name: str, value: object) -> str | None:
    try:
        return plain_text(name, value)
    except RowFaultError:
        return None
