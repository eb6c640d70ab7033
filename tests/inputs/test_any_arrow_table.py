"""Any Arrow table goes through stage and merge: what is carried comes back, or the package says why not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, reject, settings

from batchllm_operators.errors import BatchLLMError
from tests.inputs.arrow_tables import matches, tables
from tests.inputs.carried import ANSWER, Carried, carried


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn=tables())
def test_any_table_is_carried_as_it_is_by_both_sinks(model: str, drawn: tuple[pa.Table, dict[str, list[Any]]]) -> None:
    table, values = drawn
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        try:
            pq.write_table(table, path)
        except pa.ArrowNotImplementedError:
            reject()  # Arrow writes no views within lists
        try:
            output = carried(model, Path(folder) / "job", path)
        except BatchLLMError as error:
            assert set(table.column_names) & ANSWER.keys(), error
            return
        assert output.errors == [None] * len(table)
        expect_columns_of_parquet(output, pq.read_table(path))
        assert len(output.rows) == len(table)
        for name, column in values.items():
            found = [row[name] for row in output.rows]
            kind = table.schema.field(name).type
            assert all(matches(one, value, kind) for one, value in zip(found, column, strict=True)), (found, column)


def expect_columns_of_parquet(output: Carried, given: pa.Table) -> None:
    found = output.table
    assert found.column_names == [*given.column_names, *ANSWER]
    for name in given.column_names:
        column, expected = found[name].combine_chunks(), given[name].combine_chunks()
        if pa.types.is_null(expected.type):
            assert column.null_count == len(column)
        else:
            expected = expected if expected.type.equals(column.type) else expected.cast(column.type)
            # Text, because arrays with NaN are never equal; nothing in it is left out.
            shown = [one.to_string(window=10, container_window=10) for one in (column, expected)]
            assert shown[0] == shown[1]
