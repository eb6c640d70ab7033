"""The scheduled deployment of the examples, deployed and run by the real Prefect commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE, RESULTS_FOLDER
from tests.flows.jobs import read_output, write_input

EXAMPLES = Path(__file__).parents[2] / "examples"


def prefect(arguments: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=EXAMPLES,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def process_worker(environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu-nodes", "--type", "process"],
            cwd=log.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        worker.terminate()
        try:
            worker.wait(timeout=60)
        except subprocess.TimeoutExpired:
            # Prefect 3.7.7's worker sometimes hangs when it is to end just as its run's process does. How it ends is no
            # part of this test.
            worker.kill()
            worker.wait()


def on(engine_python: str, job: dict[str, Any], **sink: str) -> dict[str, Any]:
    """The parameters of the deployment, but for the engine: what vLLM answers is tested elsewhere."""
    execution = {"engine_python": engine_python, "part_seconds": 0.1}
    return {"job": job | {"execution": execution, "sink": job["sink"] | sink}}


def test_a_deployment_by_module_path_is_run_by_a_process_worker_and_ends_its_engine_when_it_is_cancelled(
    bucket: str,
    tiny_llama: str,
    prefect_server: None,
    tmp_path: Path,
    told_engine: Callable[..., str],
    group_is_gone: Callable[[int], bool],
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.deployments import run_deployment
    from prefect.settings import get_current_settings
    from prefect.states import Cancelling

    tickets = {
        "ticket_id": [f"t{n}" for n in range(40)],
        "product": ["lamp"] * 40,
        "body": [f"it {n}" for n in range(40)],
    }
    write_input(f"{bucket}/tickets", pa.table(tickets), files=1)
    environment = os.environ | {
        "PREFECT_API_URL": str(get_current_settings().api.url),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "BATCHLLM_BUCKET": bucket,
        "BATCHLLM_MODEL": tiny_llama,
    }
    prefect(["work-pool", "create", "gpu-nodes", "--type", "process", "--overwrite"], environment)
    prefect(["deploy", "--all"], environment)
    name, log, submitted = "batch-inference/nightly", tmp_path / "worker.log", tmp_path / "submitted"
    quick, slow = told_engine(), told_engine(step_seconds=0.2, submitted=str(submitted))
    with get_client(sync_client=True) as client, process_worker(environment, log):
        job = client.read_deployment_by_name(name).parameters["job"]
        cancelled = run_deployment(name, parameters=on(slow, job, uri=f"{bucket}/cancelled"), timeout=0)
        parts = Store(f"{bucket}/cancelled")
        wait_until(lambda: any(f"/{RESULTS_FOLDER}/" in part for part in parts.names()), log)
        client.set_flow_run_state(cancelled.id, Cancelling())
        wait_until(lambda: bool(client.read_flow_run(cancelled.id).state.is_final()), log)
        finished = run_deployment(name, parameters=on(quick, job), timeout=240, poll_interval=1)
        state = client.read_flow_run(cancelled.id).state
    assert state.is_cancelled(), state
    assert group_is_gone(int(submitted.read_text().split()[0]))
    assert not parts.exists(MANIFEST_FILE)
    assert finished.state is not None
    assert finished.state.is_completed(), log.read_text()
    output_rows = read_output(f"{bucket}/summaries")
    assert output_rows["ticket_id"].to_pylist() == tickets["ticket_id"]
    assert output_rows["completion"].null_count == 0


def wait_until(is_so: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 180
    while not is_so():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
