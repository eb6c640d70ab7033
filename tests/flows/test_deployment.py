"""The scheduled deployment of the examples, deployed and run by the real Prefect commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.engine
def test_a_deployment_by_module_path_is_run_by_a_process_worker(
    bucket: str, tiny_llama: str, prefect_server: None, tmp_path: Path
) -> None:
    import pyarrow as pa
    from prefect.deployments import run_deployment
    from prefect.settings import get_current_settings

    tickets = pa.table({"ticket_id": ["t1", "t2"], "product": ["lamp", "lamp"], "body": ["broken", "too bright"]})
    write_input(f"{bucket}/tickets", tickets, files=1)
    environment = os.environ | {
        "PREFECT_API_URL": str(get_current_settings().api.url),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "BATCHLLM_BUCKET": bucket,
        "BATCHLLM_MODEL": tiny_llama,
    }
    prefect(["work-pool", "create", "gpu-nodes", "--type", "process", "--overwrite"], environment)
    prefect(["deploy", "--all"], environment)
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu-nodes", "--type", "process"],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        flow_run = run_deployment("batch-inference/nightly", timeout=240, poll_interval=2)
    finally:
        worker.terminate()
        try:
            worker.wait(timeout=60)
        except subprocess.TimeoutExpired:
            # Prefect 3.7.7's worker sometimes hangs when it is to end just as its run's process does. How it ends is no
            # part of this test.
            worker.kill()
            worker.wait()
    assert flow_run.state is not None
    assert flow_run.state.is_completed(), log.read_text()
    output_rows = read_output(f"{bucket}/summaries")
    assert output_rows["ticket_id"].to_pylist() == ["t1", "t2"]
    assert output_rows["completion"].null_count == 0
