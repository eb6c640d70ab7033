"""Commands about job files: init, validate and schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from batchllm_flows.commands.failures import EXIT_FAILED, fail
from batchllm_flows.commands.options import EndpointUrl, JobFile, Settings, load_job
from batchllm_flows.commands.output import set_up_logs
from batchllm_flows.job import BatchJob
from batchllm_operators.stage.without_torch import leave_out_torch


def init(
    uri: Annotated[str, typer.Option("--input", metavar="URI", help="the input: object, folder or glob")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="the job file to write")] = Path("job.yaml"),
    model: Annotated[str | None, typer.Option(metavar="ID", help="the model; default: a small one")] = None,
    endpoint_url: EndpointUrl = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if there is one")] = False,
) -> None:
    """Write a commented job file for an input, with the columns found there; asks nothing."""
    from batchllm_flows.new_job import new_job_file

    if output.exists() and not force:
        fail(f"--output: {output} exists; --force replaces it", EXIT_FAILED)
    text = new_job_file(uri, model=model, endpoint_url=endpoint_url)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"--output: cannot write {output}: {error.strerror}", EXIT_FAILED)
    typer.echo(f"{output} is written: look at its prompt, then batchllm validate {output}")


def validate(job_file: JobFile, settings: Settings = None) -> None:
    """Check a job without staging it: file, source, columns, model and sink. Exit code 1: a check failed."""
    set_up_logs()
    job = load_job(job_file, settings)
    leave_out_torch(job.model)
    from batchllm_flows.job_checks import check_job

    typer.echo(f"ok      job file: {job.name!r}")
    failed = 0
    for check in check_job(job):
        typer.echo(f"{'ok' if check.ok else 'FAILED':8}{check.name}: {check.found}")
        failed += not check.ok
    raise typer.Exit(EXIT_FAILED if failed else 0)


def schema() -> None:
    """Print the JSON schema of a job file."""
    typer.echo(json.dumps(BatchJob.model_json_schema(), indent=2))
