"""Commands that compute: run, plan and demo."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from batchllm_flows.commands.failures import EXIT_ROW_ERRORS, debugging
from batchllm_flows.commands.options import AsJson, Day, JobFile, Quiet, Settings, load_job
from batchllm_flows.commands.output import hide_tracebacks, print_result, set_up_logs
from batchllm_flows.dates import dated_job, moment_of
from batchllm_flows.imports_ahead import import_steps_ahead
from batchllm_flows.prefect_server import (
    STARTUP_SECONDS,
    no_heartbeat_to_temporary_server,
    prepare_prefect,
    require_server,
)
from batchllm_operators.stage.without_torch import leave_out_torch

ServerTimeout = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="SECONDS",
        help=f"how long Prefect's temporary server may take to start; default: Prefect's own setting, else "
        f"{STARTUP_SECONDS}",
        show_default=False,
    ),
]


def run(
    ctx: typer.Context,
    job_file: JobFile,
    settings: Settings = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="only the first N rows, as a job of its own with a folder of its own"),
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="compute rows with an engine's error again, in a complete output too")
    ] = False,
    day: Day = None,
    server_timeout: ServerTimeout = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a job. Exit code 0: all rows answered, 3: finished with row errors, 1: failed, 2: usage."""
    set_up_logs(quiet=quiet)
    job = dated_job(load_job(job_file, settings), _moment(day))
    if limit is not None:
        job = job.first_rows(limit)
    prepare_prefect(server_timeout)
    leave_out_torch(job.model)
    from batchllm_operators.execute.engine_ahead import engine_ahead

    # The engine's process starts first: it imports vLLM while this one imports Prefect and its server starts.
    with engine_ahead(job.execution):
        import_steps_ahead()
        require_server()
        from batchllm_flows.flows import batch_inference
        from batchllm_flows.report_text import report_markdown

        if not debugging(ctx):
            hide_tracebacks()
        with no_heartbeat_to_temporary_server():
            report = batch_inference(job, retry_errors=retry_errors)
    print_result(report.model_dump(mode="json"), report_markdown(report), as_json=as_json)
    raise typer.Exit(EXIT_ROW_ERRORS if report.rows_error else 0)


def plan(
    job_file: JobFile, settings: Settings = None, day: Day = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Stage and plan a job and print the plan; starts no engine. Exit code 3: some rows have errors."""
    set_up_logs(quiet=quiet)
    job = dated_job(load_job(job_file, settings), _moment(day))
    leave_out_torch(job.model)
    from batchllm_flows.planning import plan_job
    from batchllm_operators.plan.markdown import plan_markdown

    summary = plan_job(job)
    print_result(summary.model_dump(mode="json"), plan_markdown(summary), as_json=as_json)
    raise typer.Exit(EXIT_ROW_ERRORS if summary.counts.error_rows else 0)


def _moment(day: datetime | None) -> datetime:
    return datetime.now(UTC) if day is None else moment_of(day.date())


def demo(
    folder: Annotated[Path, typer.Option(help="where the demo keeps its buckets and summary")] = Path(".demo"),
    models: Annotated[Path, typer.Option(help="where the demo keeps its model")] = Path(".models"),
    fresh: Annotated[bool, typer.Option("--fresh", help="remove the output of an earlier demo first")] = False,
    server_timeout: ServerTimeout = None,
) -> None:
    """Run a whole job on this machine: S3 server, real model, real engine."""
    set_up_logs()
    prepare_prefect(server_timeout)
    from batchllm_flows.demo.run import run_demo

    raise typer.Exit(run_demo(folder, models, fresh=fresh))
