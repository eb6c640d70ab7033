"""The command that sets up a Prefect server for runs that nobody watches."""

from __future__ import annotations

from typing import Annotated

import typer

from batchllm_flows.commands.failures import EXIT_FAILED, fail
from batchllm_flows.commands.options import parsed_age
from batchllm_flows.commands.output import set_up_logs
from batchllm_flows.prefect_server import prepare_prefect


def setup_automations(
    silent_after: Annotated[
        str, typer.Option(metavar="AGE", help="runs without a heartbeat for so long become Crashed")
    ] = "10m",
    notify: Annotated[
        str | None,
        typer.Option(metavar="TYPE/NAME", help="notification block that is told of failed runs, as slack-webhook/ops"),
    ] = None,
) -> None:
    """Let the Prefect server mark runs that were killed as Crashed, and tell of runs that fail.

    Without it a run whose process was killed stays Running for ever. Run it again to change what is there.
    """
    set_up_logs()
    seconds = parsed_age("--silent-after", silent_after)
    prepare_prefect(None)
    from prefect.settings import get_current_settings

    if get_current_settings().api.url is None:
        fail("no Prefect server is set: a temporary one forgets its automations; set PREFECT_API_URL", EXIT_FAILED)
    from batchllm_flows.automations import set_up_automations
    from batchllm_flows.prefect_server import require_server

    require_server()
    for one in set_up_automations(seconds, notify):
        typer.echo(f"{one.name} ({one.id})")
