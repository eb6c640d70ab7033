"""Automations of Prefect's server for runs of this package: runs that are killed are Crashed, and failures are told."""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import Automation, EventTrigger, Posture, ResourceSpecification
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY

from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_flows.nights import nightly_inference
from batchllm_operators.errors import TerminalError

FLOW_NAMES = tuple(flow.name for flow in (batch_inference, plan_batch_inference, nightly_inference))
CRASHED_NAME = "batchllm-flows: silent runs are Crashed"
FAILURE_NAME = "batchllm-flows: failed runs are told"
LEAST_HEARTBEATS = 2
"""Heartbeats that a run may miss before it counts as dead: one may be lost on the way."""

_ENDS = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")
_SUBJECT = "{{ flow.name }}: {{ flow_run.name }} is {{ flow_run.state.name }}"
_BODY = "{{ flow_run.state.message }}\n\n{{ flow_run|ui_url }}"


def set_up_automations(silent_after_s: float, notify: str | None = None) -> list[Automation]:
    """Make the automations on the server that is set, or bring those that are there up to date.

    Args:
        silent_after_s: seconds without a heartbeat after which a run counts as dead.
        notify: `TYPE/NAME` of a notification block, as `slack-webhook/ops`, that is told of failed and crashed runs;
            None: nobody is told, and an automation that tells stays as it is.

    Returns:
        What is on the server now.

    Raises:
        TerminalError: a time in which a living run sends too few heartbeats, or no such block.
    """
    frequency = PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value()
    if frequency is not None and silent_after_s < LEAST_HEARTBEATS * frequency:
        raise TerminalError(
            f"--silent-after: expected at least {LEAST_HEARTBEATS * frequency} s, as runs send a heartbeat every "
            f"{frequency} s (PREFECT_FLOWS_HEARTBEAT_FREQUENCY), got {silent_after_s:g} s"
        )
    wanted = [crashed_automation(timedelta(seconds=silent_after_s))]
    if notify is not None:
        wanted.append(_failure_automation(notify))
    return [_saved(one) for one in wanted]


def crashed_automation(silent_after: timedelta) -> Automation:
    """A run that has sent a heartbeat, and then neither another one nor its end for so long, becomes Crashed."""
    return Automation(
        name=CRASHED_NAME,
        description="Marks runs whose process was killed, which nobody else would end.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in _ENDS)},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=silent_after,
            **_of_our_flows(),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {silent_after.total_seconds():g} s: its process was killed. Run the job"
                " again: it goes on where this run ended.",
            )
        ],
    )


def _failure_automation(notify: str) -> Automation:
    return Automation(
        name=FAILURE_NAME,
        description="Tells of runs that failed or crashed.",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"},
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            **_of_our_flows(),
        ),
        actions=[SendNotification(block_document_id=_block_id(notify), subject=_SUBJECT, body=_BODY)],
    )


def _of_our_flows() -> dict[str, ResourceSpecification]:
    related = {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOW_NAMES)}
    return {
        "match": ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        "match_related": ResourceSpecification(related),
    }


def _block_id(name: str) -> object:
    try:
        block = Block.load(name)
    except ValueError as error:
        raise TerminalError(f"--notify: {error}") from error
    if not isinstance(block, NotificationBlock):
        raise TerminalError(f"--notify: expected a block that notifies, {name} is a {type(block).__name__}")
    return block._block_document_id


def _saved(automation: Automation) -> Automation:
    with get_client(sync_client=True) as client:
        there = client.read_automations_by_name(automation.name)
    if there:
        automation.id = there[0].id
        automation.update()
    else:
        automation.create()  # notes its id
    return automation
