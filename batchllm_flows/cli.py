"""The command line `batchllm`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
import yaml
from rich.console import Console
from rich.markdown import Markdown

from batchllm_flows.job import BatchJob, InvalidJobError
from batchllm_operators.errors import BatchLLMError

Result = TypeVar("Result")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_ROW_ERRORS = 3

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Large offline LLM jobs: object storage in, object storage out.",
)

JobFile = Annotated[Path, typer.Argument(help="job file, YAML or JSON", show_default=False)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="set a field of the job; may be repeated")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no log, no progress; only the result and errors")]


@app.command()
def run(job_file: JobFile, settings: Settings = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Run a job. Exit code 0: all rows answered, 3: finished with row errors, 1: failed, 2: usage."""
    _prepare_prefect(quiet=quiet)
    job = _load(job_file, settings)
    from batchllm_operators.execute.engine_ahead import engine_ahead

    # The engine's process starts first: it imports vLLM while this one imports Prefect and its server starts.
    with engine_ahead(job.execution):
        from batchllm_flows.flows import batch_inference
        from batchllm_flows.report_text import report_markdown

        report = _guarded(lambda: batch_inference(job))
    _print(report.model_dump(mode="json"), report_markdown(report), as_json)
    raise typer.Exit(EXIT_ROW_ERRORS if report.rows_error else 0)


@app.command()
def plan(job_file: JobFile, settings: Settings = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Stage and plan a job and print the plan; starts no engine."""
    _prepare_prefect(quiet=quiet)
    job = _load(job_file, settings)
    from batchllm_flows.flows import plan_batch_inference
    from batchllm_operators.plan.markdown import plan_markdown

    summary = _guarded(lambda: plan_batch_inference(job))
    _print(summary.model_dump(mode="json"), plan_markdown(summary), as_json)


@app.command()
def report(
    uri: Annotated[str, typer.Argument(help="folder of a job's output", show_default=False)],
    endpoint_url: Annotated[str | None, typer.Option(help="S3 endpoint, where it is not AWS")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="copy the page with plots to this file")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the report of the job whose output is in a folder."""
    from batchllm_flows.report import read_report, read_report_page
    from batchllm_flows.report_text import report_markdown
    from batchllm_operators.merge.spec import SinkSpec
    from batchllm_operators.spec import StorageOptions

    sink = SinkSpec(uri=uri, storage=StorageOptions(endpoint_url=endpoint_url))
    found = _guarded(lambda: read_report(sink))
    if html is not None:
        page = _guarded(lambda: read_report_page(sink))
        try:
            html.write_bytes(page)
        except OSError as error:
            _fail(f"--html: cannot write {html}: {error.strerror}", EXIT_FAILED)
    _print(found.model_dump(mode="json"), report_markdown(found), as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a job file."""
    typer.echo(json.dumps(BatchJob.model_json_schema(), indent=2))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="where the demo keeps its buckets and summary")] = Path(".demo"),
    models: Annotated[Path, typer.Option(help="where the demo keeps its model")] = Path(".models"),
    fresh: Annotated[bool, typer.Option("--fresh", help="remove the output of an earlier demo first")] = False,
) -> None:
    """Run a whole job on this machine: S3 server, real model, real engine."""
    _prepare_prefect(quiet=False)
    from batchllm_flows.demo.run import run_demo

    raise typer.Exit(_guarded(lambda: run_demo(folder, models, fresh=fresh)))


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(help="folder of a job's output", show_default=False)],
    endpoint_url: Annotated[str | None, typer.Option(help="S3 endpoint, where it is not AWS")] = None,
    as_json: AsJson = False,
) -> None:
    """Read a job's output and work folder and check every byte. Exit code 0: whole, 1: damaged."""
    from batchllm_flows.verify import verification_markdown, verify_output
    from batchllm_operators.merge.spec import SinkSpec
    from batchllm_operators.spec import StorageOptions

    found = _guarded(lambda: verify_output(SinkSpec(uri=uri, storage=StorageOptions(endpoint_url=endpoint_url))))
    _print(found.model_dump(mode="json"), verification_markdown(found), as_json)
    raise typer.Exit(EXIT_FAILED if found.faults else 0)


def main() -> None:
    """Entry point of the command."""
    app()


def _load(job_file: Path, settings: list[str] | None) -> BatchJob:
    try:
        return BatchJob.from_file(job_file, _overrides(settings or []))
    except InvalidJobError as error:
        _fail(str(error), EXIT_USAGE)


def _overrides(settings: list[str]) -> dict[str, Any]:
    values = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise typer.BadParameter(f"--set: expected KEY.PATH=VALUE, got {setting!r}")
        values[path] = yaml.safe_load(text)
    return values


def _guarded(work: Callable[[], Result]) -> Result:
    try:
        return work()
    except BatchLLMError as error:
        _fail(str(error), EXIT_FAILED)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"batchllm: {message}", err=True)
    raise typer.Exit(code)


def _print(values: dict[str, Any], markdown: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    elif sys.stdout.isatty():
        Console().print(Markdown(markdown))
    else:
        typer.echo(markdown, nl=False)


def _prepare_prefect(*, quiet: bool) -> None:
    """Prefect reads its settings at import: what the user has set stays."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL" if quiet else "INFO")
    if quiet:
        os.environ["BATCHLLM_QUIET"] = "1"
