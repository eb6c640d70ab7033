"""Jobs and inputs for the tests of the whole way."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from batchllm_flows.job import BatchJob
from batchllm_operators.records import Manifest
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE

DOCUMENTS = [f"Document {number}: " + f"the {number}th river runs north. " * 30 for number in range(4)]


def questions(rows: int = 40) -> pa.Table:
    """Rows over a few long documents, shuffled by construction, the first two equal but for their id."""
    numbers = [0, 0, *range(2, rows)]
    return pa.table(
        {
            "id": [f"row-{index}" for index in range(rows)],
            "document": [DOCUMENTS[number % len(DOCUMENTS)] for number in numbers],
            "question": [f"What about point {number}?" for number in numbers],
        }
    )


def job_values(source: str, sink: str, model: str, /, **changes: Any) -> dict[str, Any]:
    """A chat job on the tiny model: short answers, eager engine, small cache, no calibration."""
    values: dict[str, Any] = {
        "name": "questions",
        "source": {"uri": source, "format": "parquet", "id_column": "id"},
        "prompt": {"kind": "chat", "system": "{{ document }}", "user": "{{ question }}"},
        "model": {
            "id": model,
            "max_model_len": 2048,
            "engine_args": {"enforce_eager": True, "num_gpu_blocks_override": 512, "max_num_seqs": 16},
        },
        "sampling": {"max_tokens": 6},
        "execution": {"retries": 1, "part_rows": 10, "calibrate": False},
        "sink": {"uri": sink},
    }
    for path, value in changes.items():
        section, _, field = path.partition("__")
        values[section] = values[section] | {field: value} if field else value
    return values


def job(source: str, sink: str, model: str, /, **changes: Any) -> BatchJob:
    """`job_values`, validated."""
    return BatchJob.model_validate(job_values(source, sink, model, **changes))


def write_input(uri: str, table: pa.Table, files: int = 2) -> None:
    """The table as a few Parquet objects."""
    store = Store(uri)
    rows = -(-table.num_rows // files) if table.num_rows else 1
    for index in range(files):
        store.write_table(f"rows-{index}.parquet", table.slice(index * rows, rows))


def read_output(uri: str) -> pa.Table:
    """All rows of a complete output, file after file as the manifest lists them."""
    store = Store(uri)
    manifest = Manifest.model_validate_json(store.read_bytes(MANIFEST_FILE))
    tables = []
    for file in manifest.files:
        with store.parquet(file.name) as opened:
            tables.append(opened.read())
    return pa.concat_tables(tables)
