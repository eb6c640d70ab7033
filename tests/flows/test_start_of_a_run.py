"""What makes a run from the shell short: imports beside the server's start, and no wait for heartbeats nobody hears."""

from __future__ import annotations

import subprocess
import sys

import pytest

from batchllm_flows.prefect_server import no_heartbeat_to_temporary_server


@pytest.mark.parametrize(("api_url", "heartbeat"), [(None, None), ("http://127.0.0.1:4200/api", 60)])
def test_only_a_run_on_a_temporary_server_sends_no_heartbeat(api_url: str | None, heartbeat: int | None) -> None:
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        get_current_settings,
        temporary_settings,
    )

    with temporary_settings({PREFECT_API_URL: api_url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 60}):
        with no_heartbeat_to_temporary_server():
            assert get_current_settings().flows.heartbeat_frequency == heartbeat
        assert get_current_settings().flows.heartbeat_frequency == 60


def test_the_steps_are_imported_ahead_without_prefect() -> None:
    program = (
        "import sys, threading; from batchllm_flows.imports_ahead import import_steps_ahead; import_steps_ahead();"
        "[thread.join() for thread in threading.enumerate() if thread is not threading.current_thread()];"
        "names = ('prefect', 'torch', 'transformers.models.auto.tokenization_auto', 'batchllm_operators.stage.step');"
        "print(*(name for name in names if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert set(done.stdout.split()) - {"torch"} == {
        "transformers.models.auto.tokenization_auto",
        "batchllm_operators.stage.step",
    }
