"""Two streams of tables with the same rows, put side by side."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pyarrow as pa

from batchllm_operators.errors import TerminalError


def side_by_side(
    inputs: Iterator[pa.Table], others: Iterator[pa.Table], schema: pa.Schema, uri: str
) -> Generator[pa.Table]:
    """Input rows beside what belongs to them; both come in row order, in tables of sizes of their own.

    Args:
        inputs: the input rows; of columns beyond those that the schema leaves to them nothing is taken.
        others: what stands behind them.
        schema: of the columns of both.
        uri: of the source.

    Raises:
        TerminalError: the numbers of rows differ, so that the input has changed.
    """
    rest = pa.table({})
    for table in others:
        other = table
        columns_of_input = len(schema) - other.num_columns
        while len(other):
            if not len(rest):
                rest = next(inputs, None)
                if rest is None:
                    raise _changed(uri)
            rows = min(len(rest), len(other))
            columns = [*rest.slice(0, rows).columns[:columns_of_input], *other.slice(0, rows).columns]
            yield pa.Table.from_arrays(columns, schema=schema)
            rest, other = rest.slice(rows), other.slice(rows)
    if len(rest) or next(inputs, None) is not None:
        raise _changed(uri)


def _changed(uri: str) -> TerminalError:
    return TerminalError("source: has not the rows that were staged: it changed while it was read", uri=uri)
