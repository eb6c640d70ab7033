"""The command line `batchllm`."""

from __future__ import annotations

from typing import Annotated

import typer

from batchllm_flows import __version__
from batchllm_flows.commands import automations, folders, job_files, jobs
from batchllm_flows.commands.failures import DEBUG_OPTION, CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Large offline LLM jobs: object storage in, object storage out.\n\n"
    "Exit codes: 0 all rows answered, 3 finished with row errors within execution.max_error_fraction, 1 failed, "
    "2 usage, 130 interrupted.",
)

for command in (
    job_files.init,
    job_files.validate,
    jobs.plan,
    jobs.run,
    folders.status,
    folders.report,
    folders.verify,
    folders.clean,
    automations.setup_automations,
    job_files.schema,
    jobs.demo,
):
    app.command()(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"batchllm-flows {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and end", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG_OPTION, help="show the traceback of an error")] = False,
) -> None:
    """Options of all commands."""
    del version, debug


def main() -> None:
    """Entry point of the command."""
    app()
