"""A staged job whose results the tests write themselves: no tokenizer, no engine."""

from __future__ import annotations

import base64
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm_operators.formats import Source, open_source
from batchllm_operators.merge.merging import merge_results
from batchllm_operators.records import InputObject, Manifest, RowErrorExample, StagedPart, StageSummary
from batchllm_operators.specs.sink import SinkSpec
from batchllm_operators.specs.source import SourceSpec
from batchllm_operators.store import Store
from batchllm_operators.work.staged import STAGED_SCHEMA
from tests.generation import RESULT_SCHEMA

JOB_ID = "0123456789abcdef"


def key(name: str | int) -> bytes:
    return str(name).encode().ljust(16, b"\0")


def answer(name: str | int, completion: str = "answer", **values: Any) -> dict[str, Any]:
    """One row of a result part."""
    return {
        "request_key": key(name), "output_token_ids": [1, 2], "completion": f"{completion} {name}",
        "finish_reason": "stop", "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 2, "error": None,
    } | values  # fmt: skip


def engine_error(name: str | int) -> dict[str, Any]:
    error = {"code": "engine_error", "message": f"no luck with {name}"}
    return dict.fromkeys(RESULT_SCHEMA.names) | {"request_key": key(name), "error": error}


@dataclass
class Job:
    """A job after its execute step.

    `requests` names the request of each row; None is a row with a staged error.
    """

    folder: Path
    requests: Sequence[str | int | None]
    part_rows: int = 7
    jsonl: bool = False
    fingerprint: list[InputObject] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work = Store(str(self.folder / "work"))
        self.sink = Store(str(self.folder / "sink"))
        self._numbers = itertools.count()
        self.rows = [{"n": number, "name": f"row {number}"} for number in range(len(self.requests))]
        self.schema = pa.schema([("n", pa.int64()), ("name", pa.string())])
        (self.folder / "input").mkdir(parents=True)
        if self.jsonl:
            (self.folder / "input" / "a.jsonl").write_bytes(b"\n".join(map(orjson.dumps, self.rows)))
        else:
            table = pa.Table.from_pylist(self.rows, self.schema)
            pq.write_table(table, self.folder / "input" / "a.parquet", row_group_size=5)
        self.fingerprint = self.source().objects
        self.stage = self.write_staged()

    def source(self) -> Source:
        form = "jsonl" if self.jsonl else "parquet"
        return open_source(SourceSpec(uri=str(self.folder / "input"), format=form))

    def write_staged(self) -> StageSummary:
        """Write `staged/` for the rows and the schema as they are."""
        staged = [
            {
                "row_index": row, "row_id": f"id-{row}", "request_key": None if name is None else key(name),
                "prompt_token_ids": None if name is None else [1] * 10, "max_tokens": None if name is None else 2,
                "sampling": None, "error": {"code": "invalid_row", "message": "blank"} if name is None else None,
            }
            for row, name in enumerate(self.requests)
        ]  # fmt: skip
        parts = []
        for first in range(0, len(staged), self.part_rows):
            rows = staged[first : first + self.part_rows]
            name = f"staged/part-{len(parts):05d}.parquet"
            digest = self.work.write_table(name, pa.Table.from_pylist(rows, STAGED_SCHEMA))
            parts.append(StagedPart(name=name, first_row=first, rows=len(rows), digest=digest))
        good = sum(name is not None for name in self.requests)
        examples = tuple(
            RowErrorExample(row_id=f"id-{row}", message="blank")
            for row, name in enumerate(self.requests)
            if name is None
        )[:3]
        return StageSummary(
            parts=tuple(parts),
            rows=len(staged),
            error_rows={"invalid_row": len(staged) - good} if good < len(staged) else {},
            error_examples={"invalid_row": examples} if examples else {},
            prompt_tokens=10 * good,
            requests=good,
            source_schema=base64.b64encode(self.schema.serialize().to_pybytes()).decode(),
            seconds=0.0,
        )

    def add_results(self, *rows: dict[str, Any]) -> str:
        """Write a result part."""
        name = f"results/part-{next(self._numbers):05d}.parquet"
        self.work.write_table(name, pa.Table.from_pylist(list(rows), RESULT_SCHEMA))
        return name

    def answer_all(self) -> None:
        self.add_results(*(answer(name) for name in dict.fromkeys(self.requests) if name is not None))

    def merge(self, *, job_id: str = JOB_ID, max_error_fraction: float = 1.0, **sink: Any) -> Manifest:
        return merge_results(
            self.source(),
            self.stage,
            self.work,
            self.sink,
            SinkSpec(uri=self.sink.uri, **sink),
            job_id=job_id,
            job_name="test",
            fingerprint=self.fingerprint,
            max_error_fraction=max_error_fraction,
        )

    def output(self, manifest: Manifest) -> list[dict[str, Any]]:
        """All output rows, after a look at the sizes of the files."""
        rows: list[dict[str, Any]] = []
        for file in manifest.files:
            content = self.sink.read_bytes(file.name)
            assert len(content) == file.bytes
            if file.name.endswith(".jsonl"):
                found = [orjson.loads(line) for line in content.splitlines()]
            else:
                found = pq.read_table(pa.BufferReader(content)).to_pylist()
            assert len(found) == file.rows
            rows += found
        return rows

    def expected(self, results: dict[str | int, dict[str, Any]]) -> list[dict[str, Any]]:
        """The output as a plain join would have it."""
        blank = {"error": {"code": "invalid_row", "message": "blank"}}
        columns = ["completion", "finish_reason", "error", "prompt_tokens", "cached_tokens", "completion_tokens"]
        return [
            row | {column: (blank if name is None else results[name]).get(column) for column in columns}
            for row, name in zip(self.rows, self.requests, strict=True)
        ]


def plain(name: str) -> str:
    """The name of an output file without the ids of job and run."""
    return re.sub(r"^(part-\d+)-.*-[0-9a-f]{8}\.", r"\1.", name)


def error_counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["error"]["code"] for row in rows if row["error"]))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Ten rows; a and b answer several, row 4 has no request."""
    return Job(tmp_path / "job", ["a", "b", "a", "c", None, "d", "a", "e", "b", "f"])
