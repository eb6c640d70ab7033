"""Commands about the folders of jobs: status, report and clean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from batchllm_flows.commands.failures import EXIT_FAILED, fail
from batchllm_flows.commands.options import AsJson, EndpointUrl, parsed_age
from batchllm_flows.commands.output import print_result, set_up_logs
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.wording import counted, size_text

FolderUri = Annotated[str, typer.Argument(help="folder of a job's output, or a work folder", show_default=False)]


def status(uri: FolderUri, endpoint_url: EndpointUrl = None, as_json: AsJson = False) -> None:
    """Show how far the jobs of a folder are: staged, planned, answered, left, complete or not, last error."""
    set_up_logs()
    from batchllm_flows.job_status import job_statuses, status_text

    found = job_statuses(uri, StorageOptions(endpoint_url=endpoint_url))
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in found], indent=2))
    else:
        typer.echo("\n\n".join(status_text(one) for one in found))


def report(
    uri: Annotated[str, typer.Argument(help="folder of a job's output", show_default=False)],
    endpoint_url: EndpointUrl = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="copy the page with plots to this file")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the report of the job whose output is in a folder."""
    from batchllm_flows.report import read_report, read_report_page
    from batchllm_flows.report_text import report_markdown
    from batchllm_operators.specs.sink import SinkSpec

    sink = SinkSpec(uri=uri, storage=StorageOptions(endpoint_url=endpoint_url))
    found = read_report(sink)
    if html is not None:
        page = read_report_page(sink)
        try:
            html.write_bytes(page)
        except OSError as error:
            fail(f"--html: cannot write {html}: {error.strerror}", EXIT_FAILED)
    print_result(found.model_dump(mode="json"), report_markdown(found), as_json=as_json)


def verify(
    uri: Annotated[str, typer.Argument(help="folder of a job's output", show_default=False)],
    endpoint_url: EndpointUrl = None,
    as_json: AsJson = False,
) -> None:
    """Read a job's output and work folder and check every byte. Exit code 0: whole, 1: damaged."""
    from batchllm_flows.verify import verification_markdown, verify_output
    from batchllm_operators.specs.sink import SinkSpec

    found = verify_output(SinkSpec(uri=uri, storage=StorageOptions(endpoint_url=endpoint_url)))
    print_result(found.model_dump(mode="json"), verification_markdown(found), as_json=as_json)
    raise typer.Exit(EXIT_FAILED if found.faults else 0)


def clean(
    uri: FolderUri,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="without a write for so long: 12h, 7d, 2w; at least 2h, as a job may run")
    ] = "7d",
    answers_older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="delete answers that were kept for later runs before this, as 90d")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it what goes is only listed")] = False,
    endpoint_url: EndpointUrl = None,
) -> None:
    """List, and with --yes delete, work folders of complete or abandoned jobs; reports and outputs stay.

    What killed runs have left of objects that they did not finish goes too: uploads, which S3 charges for and does not
    list, and temporary files.
    """
    from batchllm_flows.cleaning import find_leftovers, find_old_folders, remove_folders

    storage, age = StorageOptions(endpoint_url=endpoint_url), parsed_age("--older-than", older_than)
    answers_age = None if answers_older_than is None else parsed_age("--answers-older-than", answers_older_than)
    leftovers = find_leftovers(uri, storage, age, answers_age)
    found = find_old_folders(uri, storage, age, required=answers_age is None and not leftovers.objects)
    for line in [*(one.line() for one in found), *leftovers.lines()]:
        typer.echo(line)
    going = [one for one in found if one.goes]
    size = sum(one.bytes for one in going) + leftovers.bytes
    total = f"{size_text(size)} in {counted(sum(one.objects for one in going) + leftovers.objects, 'object')}"
    if yes:
        remove_folders(going)
        leftovers.remove()
        typer.echo(f"deleted {total}")
    else:
        typer.echo(f"{total} to delete; nothing is deleted without --yes")
