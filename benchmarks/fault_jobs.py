"""The job that `faults.py` disturbs, and what is right of its output."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from batchllm_operators.merge.sink import read_manifest
from batchllm_operators.store import Store

ROWS = 240
COMMAND = (sys.executable, "-c", "from batchllm_flows.cli import main; main()")
"""The command line `batchllm`."""


def rows(count: int = ROWS) -> pa.Table:
    """Questions over a few documents."""
    numbers = range(count)
    return pa.table(
        {
            "id": [f"row-{n}" for n in numbers],
            "text": [f"Document {n % 6}: " + "the river runs north. " * 20 + f"What of {n}?" for n in numbers],
        }
    )


def job(source: str, sink: str, model: str, storage: dict[str, Any] | None = None) -> dict[str, Any]:
    """The job, as JSON values."""
    return {
        "name": "faults",
        "source": {"uri": source, "format": "parquet", "id_column": "id", "storage": storage or {}},
        "prompt": {"kind": "column", "column": "text"},
        "model": {"id": model, "max_model_len": 2048},
        "sampling": {"max_tokens": 4},
        "execution": {
            "backend": "scripted", "calibrate": False, "part_rows": 20, "part_seconds": 0.5, "reuse": "none",
        },
        "sink": {"uri": sink, "mode": "overwrite", "storage": storage or {}},
    }  # fmt: skip


def output(sink: Store) -> pa.Table:
    """The rows of a complete output."""
    manifest = read_manifest(sink)
    if manifest is None:
        raise TypeError(f"{sink.uri}: expected a complete output")
    tables = []
    for file in manifest.files:
        with sink.parquet(file.name) as opened:
            tables.append(opened.read())
    return pa.concat_tables(tables)


def differences(expected: pa.Table, found: pa.Table) -> Counter[str]:
    """Rows that are lost, there twice, or have another answer."""
    answers = {row["id"]: row["completion"] for row in expected.to_pylist()}
    seen = Counter(found["id"].to_pylist())
    return Counter(
        rows_lost=sum(name not in seen for name in answers),
        rows_twice=sum(count > 1 for count in seen.values()),
        rows_wrong=sum(answers.get(row["id"]) != row["completion"] for row in found.to_pylist()),
    )


def prefect_database() -> list[bytes]:
    """The content of each file of the database of Prefect's server, which this process has started."""
    from prefect.settings import get_current_settings

    url = get_current_settings().server.database.connection_url
    if url is None:
        raise TypeError("expected the settings of a server")
    path = Path(urlsplit(url.get_secret_value() if hasattr(url, "get_secret_value") else str(url)).path)
    return [file.read_bytes() for file in path.parent.glob(f"{path.name}*") if file.is_file()]
