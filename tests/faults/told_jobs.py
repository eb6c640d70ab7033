"""A whole job without an engine: its answers are told, as a function of each prompt's tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchllm_flows.job import BatchJob
from batchllm_flows.run import open_run
from batchllm_operators.formats import open_source
from batchllm_operators.merge.merging import merge_results
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.records import Manifest, PlanSummary, StageSummary
from batchllm_operators.stage.staging import stage_rows
from batchllm_operators.store import Store
from batchllm_operators.work.layout import QUARANTINE_FOLDER
from batchllm_operators.work.results import encoded_part
from tests.generation import RESULT_SCHEMA

PART_ROWS = 5
ROWS = 24
REQUESTS = 20
"""Distinct ones: four rows repeat a text."""


def texts(rows: int = ROWS, *, of: str = "text") -> pa.Table:
    return pa.table({"n": list(range(rows)), "text": [f"{of} {number % REQUESTS}" for number in range(rows)]})


def told_answer(tokens: Sequence[int]) -> str:
    return f"answer {sum(number * place for place, number in enumerate(tokens, start=1))}"


@dataclass
class Outcome:
    """What a run of the job did."""

    manifest: Manifest
    computed: int
    set_aside: list[str]
    planned: PlanSummary
    staged: StageSummary


@dataclass
class ToldJob:
    """A job in a folder of its own: `in/`, `out/` and its work folder."""

    folder: Path
    model: str

    def spec(self, **changes: Any) -> BatchJob:
        values: dict[str, Any] = {
            "name": "told",
            "source": {"uri": str(self.folder / "in"), "format": "parquet"},
            "prompt": {"kind": "template", "template": "{{ text }}"},
            "model": {"id": self.model},
            "sampling": {"max_tokens": 8},
            "sink": {"uri": str(self.folder / "out")},
        }
        for path, value in changes.items():
            section, _, field = path.partition("__")
            values[section] = {**values.get(section, {}), field: value} if field else value
        return BatchJob.model_validate(values)

    def write_input(self, table: pa.Table) -> None:
        (self.folder / "in").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self.folder / "in" / "a.parquet")

    def work(self, **changes: Any) -> Store:
        job = self.spec(**changes)
        return job.work_store(job.job_id(open_source(job.source).objects))

    @property
    def sink(self) -> Store:
        return Store(str(self.folder / "out"))

    def run(self, **changes: Any) -> Outcome:
        """All steps in their order, as the flow makes them."""
        job = self.spec(**changes)
        run = open_run(job)
        staged = stage_rows(
            open_source(job.source), job.prompt, job.sampling, job.model, run.work, fingerprint=run.objects
        )
        planned = plan_requests(run.work, staged, job.planning)
        computed = tell_answers(run.work, planned)
        manifest = merge_results(
            open_source(job.source),
            staged,
            run.work,
            run.sink,
            job.sink,
            job_id=run.job_id,
            job_name=job.name,
            fingerprint=run.objects,
            max_error_fraction=job.execution.max_error_fraction,
        )
        return Outcome(manifest, computed, run.work.names(QUARANTINE_FOLDER), planned, staged)

    def output(self, manifest: Manifest) -> pa.Table:
        """All rows of the output, file after file as the manifest lists them."""
        contents = [io.BytesIO(self.sink.read_bytes(file.name)) for file in manifest.files]
        return pa.concat_tables([pq.read_table(content) for content in contents])


def tell_answers(work: Store, planned: PlanSummary) -> int:
    """Write result parts for all bundles of a plan; returns how many requests they answer."""
    rows: list[dict[str, Any]] = []
    for bundle in planned.bundles:
        with work.parquet(bundle.name) as file:
            rows += file.read().to_pylist()
    for first in range(0, len(rows), PART_ROWS):
        work.write_bytes(*encoded_part(result_table(rows[first : first + PART_ROWS])))
    return len(rows)


def result_table(planned: Sequence[dict[str, Any]]) -> pa.Table:
    rows = [
        {
            "request_key": row["request_key"], "output_token_ids": list(row["prompt_token_ids"][:3]),
            "completion": told_answer(row["prompt_token_ids"]), "finish_reason": "stop",
            "prompt_tokens": len(row["prompt_token_ids"]), "cached_tokens": 0, "completion_tokens": 3, "error": None,
        }
        for row in planned
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, RESULT_SCHEMA)
