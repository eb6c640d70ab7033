"""`source.limit`: the first rows only, when they are staged and when they are merged."""

from __future__ import annotations

from pathlib import Path

import orjson
import pyarrow as pa
import pytest

from batchllm_flows.job import BatchJob
from batchllm_operators.formats import BATCH_ROWS, Source, open_source
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store
from tests.flows.jobs import job_values

ROWS = 2 * BATCH_ROWS + 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    rows = [{"n": number} for number in range(ROWS)]
    for name, part in (("a", rows[:1500]), ("b", rows[1500:])):
        Store(str(folder / "parquet")).write_table(f"{name}.parquet", pa.Table.from_pylist(part))
        Store(str(folder / "jsonl")).write_bytes(f"{name}.jsonl", b"\n".join(orjson.dumps(row) for row in part))
    return folder


def source(inputs: Path, form: str, limit: int | None) -> Source:
    return open_source(SourceSpec(uri=str(inputs / form), format=form, limit=limit))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("limit", [1, BATCH_ROWS - 1, BATCH_ROWS, 1501, ROWS, ROWS + 1, None])
def test_the_first_rows_are_read_twice_alike(inputs: Path, form: str, limit: int | None) -> None:
    first = source(inputs, form, limit)
    expected = list(range(min(limit or ROWS, ROWS)))
    assert [row["n"] for batch in first.batches({"n"}) for row in batch.records()] == expected
    schema = pa.schema([("n", pa.int64())])
    assert [n for table in first.tables(schema) for n in table["n"].to_pylist()] == expected
    if form == "parquet":
        assert first.rows == len(expected)


def test_the_first_rows_are_another_job_with_a_folder_of_its_own() -> None:
    whole = BatchJob.model_validate(job_values("/in", "/out/", "model"))
    first = whole.first_rows(20)
    assert (first.source.limit, first.sink.uri) == (20, "/out/_first_20")
    assert first.job_id([]) != whole.job_id([])
    assert first.job_id([]) != whole.first_rows(21).job_id([])
