"""Work folders as jobs leave them, made without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from batchllm_flows.job import BatchJob
from batchllm_flows.planning import plan_run, stage_run
from batchllm_flows.report import ExecutedPlan, StepSeconds, build_report
from batchllm_flows.run import JobRun, open_run
from batchllm_operators.formats import open_source
from batchllm_operators.merge.merging import merge_results
from batchllm_operators.plan.step import plan_staged
from batchllm_operators.records import StageSummary
from batchllm_operators.stage.step import stage_source
from batchllm_operators.work.layout import REPORT_FILE
from tests.flows.jobs import job_values, questions, write_input
from tests.flows.reports import STARTED
from tests.generation import RESULT_SCHEMA


def write_job(folder: Path, model: str, /, rows: pa.Table | None = None, **changes: Any) -> Path:
    """A job file over 8 rows, or those given, with its input in `in` and its output in `out`."""
    write_input(str(folder / "in"), questions(8) if rows is None else rows)
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_values(str(folder / "in"), str(folder / "out"), model, **changes)))
    return path


def planned_job(job_file: Path) -> tuple[JobRun, StageSummary]:
    """The job staged and planned."""
    run = open_run(BatchJob.from_file(job_file))
    staged = stage_run(run, stage_source)
    plan_run(run, staged, None, plan_staged)
    return run, staged


def answer(run: JobRun, staged: StageSummary, first: int, stop: int, *, error: str | None = None) -> None:
    """Write a result part for some rows' requests: a text, or the engine's error."""
    keys: list[bytes] = []
    for part in staged.parts:
        with run.work.parquet(part.name) as file:
            keys += file.read(["request_key"])["request_key"].to_pylist()
    rows = [
        {"request_key": key, "error": {"code": "engine_error", "message": error}}
        if error is not None
        else {
            "request_key": key,
            "output_token_ids": [1],
            "completion": "yes",
            "finish_reason": "stop",
            "prompt_tokens": 10,
            "cached_tokens": 4,
            "completion_tokens": 1,
        }
        for key in keys[first:stop]
    ]
    name = f"results/part-{first:05d}-{'error' if error else 'answer'}.parquet"
    run.work.write_table(name, pa.Table.from_pylist(rows, RESULT_SCHEMA))


def complete(run: JobRun, staged: StageSummary) -> None:
    """Merge what is answered, and write the report."""
    job = run.job
    manifest = merge_results(
        open_source(job.source),
        staged,
        run.work,
        run.sink,
        job.sink,
        job_id=run.job_id,
        job_name=job.name,
        fingerprint=run.objects,
        max_error_fraction=1.0,
    )
    report = build_report(
        manifest,
        [ExecutedPlan(plan_run(run, staged, None, plan_staged), ())],
        StepSeconds(stage=1.0, plan=1.0, execute=1.0, merge=1.0, total=4.0),
        started=STARTED,
        engines=1,
        output_uri=run.sink.uri,
        work_uri=run.work.uri,
    )
    run.work.write_bytes(REPORT_FILE, report.model_dump_json().encode())
