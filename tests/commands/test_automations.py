"""`batchllm setup-automations`: what it leaves on a Prefect server, and a run that is killed becomes Crashed by it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from prefect.automations import EventTrigger
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.events.actions import SendNotification
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from pydantic import SecretStr

from batchllm_flows.automations import CRASHED_NAME, FAILURE_NAME, crashed_automation, set_up_automations
from batchllm_operators.errors import TerminalError
from benchmarks import fault_jobs
from tests.commands.conftest import Batchllm


def names_there() -> list[str]:
    with get_client(sync_client=True) as client:
        found = [client.read_automations_by_name(name) for name in (CRASHED_NAME, FAILURE_NAME)]
    return [one.name for several in found for one in several]


@pytest.mark.usefixtures("prefect_server")
def test_they_are_made_once_and_brought_up_to_date(batchllm: Batchllm) -> None:
    assert CRASHED_NAME in batchllm("setup-automations", "--silent-after", "30m").stdout
    assert names_there() == [CRASHED_NAME]
    CustomWebhookNotificationBlock(name="ops", url="http://127.0.0.1:9/").save("ops", overwrite=True)
    made = set_up_automations(3600, "custom-webhook/ops")
    assert [one.name for one in made] == [CRASHED_NAME, FAILURE_NAME]
    assert isinstance(made[1].actions[0], SendNotification)
    again = set_up_automations(7200, "custom-webhook/ops")
    assert [one.id for one in again] == [one.id for one in made]
    assert names_there() == [CRASHED_NAME, FAILURE_NAME]
    with get_client(sync_client=True) as client:
        trigger = client.read_automations_by_name(CRASHED_NAME)[0].trigger
    assert isinstance(trigger, EventTrigger)
    assert trigger.within == timedelta(hours=2)


@pytest.mark.usefixtures("prefect_server")
def test_what_cannot_work_is_refused() -> None:
    Secret(value=SecretStr("x")).save("no-notifier", overwrite=True)
    for block, message in (("custom-webhook/nobody", "--notify: .*nobody"), ("secret/no-notifier", "is a Secret")):
        with pytest.raises(TerminalError, match=message):
            set_up_automations(3600, block)
    with (
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 180}),
        pytest.raises(TerminalError, match="--silent-after: expected at least 360 s"),
    ):
        set_up_automations(60)


def test_a_server_that_forgets_them_is_refused(batchllm: Batchllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        result = batchllm("setup-automations")
    assert result.exit_code == 1
    assert "set PREFECT_API_URL" in result.output


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of processes that use a Prefect server which looks for silent runs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "home"), "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--port", str(port)]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: answers(f"{environment['PREFECT_API_URL']}/health"), "the server answers")
        yield environment
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def test_a_run_that_is_killed_becomes_crashed(own_server: dict[str, str], tiny_llama: str, tmp_path: Path) -> None:
    pq.write_table(fault_jobs.rows(), tmp_path / "in.parquet")
    job = tmp_path / "job.json"
    job.write_text(json.dumps(fault_jobs.job(str(tmp_path / "in.parquet"), str(tmp_path / "out"), tiny_llama)))
    with (
        temporary_settings({PREFECT_API_URL: own_server["PREFECT_API_URL"]}),
        get_client(sync_client=True) as client,
    ):

        def run_of_the_job() -> FlowRun | None:
            return next(iter(client.read_flow_runs()), None)

        def state() -> State:
            found = run_of_the_job()
            assert found is not None
            assert found.state is not None
            return found.state

        # Less than two heartbeats, which are 30 s apart, so that the test is quick; enough for one that comes late.
        automation = crashed_automation(timedelta(seconds=45))
        automation.create()
        command = [sys.executable, "-m", "benchmarks.faults_run", str(job), str(tmp_path / "answered"), "1"]
        run = subprocess.Popen(command, env=own_server, cwd=Path(fault_jobs.__file__).parents[1])
        until(lambda: (tmp_path / "answered").exists() and run_of_the_job() is not None, "the run computes")
        run.kill()
        run.wait()
        assert state().is_running()
        until(lambda: state().is_crashed(), "the run is marked as crashed")
        assert "its process was killed" in str(state().message)
