"""Whole jobs on engines that do as they are told: two at a time, one that dies, one from outside, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from batchllm_flows.flows import batch_inference
from batchllm_flows.job import BatchJob
from batchllm_operators.errors import EngineDiedError
from batchllm_operators.execute.backends import BackendKind, register_backend, unregister_backend
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE, RESULTS_FOLDER, WORK_FOLDER
from tests.conftest import REPOSITORY, InlineEngines
from tests.execute.pipe_backend import PipeBackend
from tests.execute.told_engine import told_maker
from tests.flows.jobs import job, questions, read_output, write_input

pytestmark = pytest.mark.usefixtures("prefect_server")

TINY_BUNDLES = {"bundle_minutes": 0.00003}
"""About three for each of the four documents, by the rates of the tiny model."""


def a_job(folder: Path, model: str, rows: pa.Table | None = None, **execution: object) -> BatchJob:
    write_input(str(folder / "in"), questions(80) if rows is None else rows)
    settings = {"calibrate": False, "part_rows": 4, "retries": 1} | execution
    return job(str(folder / "in"), str(folder / "out"), model, planning=TINY_BUNDLES, execution=settings)


def test_a_job_with_two_engines_uses_both_and_answers_every_row_once(
    tmp_path: Path, tiny_llama: str, told_engine: Callable[..., str]
) -> None:
    submitted = tmp_path / "submitted"
    python = told_engine(step_seconds=0.02, submitted=str(submitted))
    report = batch_inference(a_job(tmp_path, tiny_llama, engines=2, engine_python=python))
    processes = [line.split()[0] for line in submitted.read_text().splitlines()]
    assert len(set(processes)) == 2
    assert len(processes) == report.computed_requests == 79
    assert (report.engines, report.rows_out, report.rows_error) == (2, 80, 0)
    assert report.bundles >= 4
    assert read_output(report.output_uri)["completion"].null_count == 0


def test_a_job_runs_on_a_backend_from_outside(tmp_path: Path, tiny_llama: str) -> None:
    make = partial(told_maker, {"step_seconds": 0.01})
    register_backend(BackendKind("pipes", lambda execution: PipeBackend(execution.engines, make)))
    try:
        report = batch_inference(a_job(tmp_path, tiny_llama, engines=2, backend="pipes"))
    finally:
        unregister_backend("pipes")
    assert (report.engines, report.rows_out, report.rows_error) == (2, 80, 0)


def test_a_backend_that_nobody_brings_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"execution\.backend\s.*expected an engine backend among local, got 'slurm'"):
        job("/in", "/out", "model", execution={"backend": "slurm"})


def with_one_word(row: int, word: str) -> pa.Table:
    rows = questions(80)
    asked = rows["question"].to_pylist()
    asked[row] = f"What about {word} {row}?"
    return rows.set_column(rows.schema.get_field_index("question"), "question", pa.array(asked))


def test_a_bundle_that_fails_does_not_end_the_others_and_alone_is_left_to_compute(
    tmp_path: Path, tiny_llama: str, inline_engines: InlineEngines
) -> None:
    from transformers import AutoTokenizer

    word = "zebra"
    (token,) = AutoTokenizer.from_pretrained(tiny_llama)(f" {word}")["input_ids"]
    this_job = a_job(tmp_path, tiny_llama, with_one_word(4, word), backend="inline", retries=0)
    inline_engines.script = Script(poison=token, step_seconds=0.001)

    with pytest.raises(EngineDiedError, match="killed by signal 9"):
        batch_inference(this_job)
    assert len(inline_engines.backends[0].links) == 2, "a new engine went on with the other bundles"
    assert not Store(f"{tmp_path}/out").exists(MANIFEST_FILE)

    inline_engines.script = Script()
    report = batch_inference(this_job)
    assert 0 < report.computed_requests <= 40, "an engine has two bundles at the most"
    output = read_output(report.output_uri)
    assert (report.rows_out, output["completion"].null_count) == (80, 0)


def state_of_run(name: str) -> str:
    """What Prefect's server knows of the last run of a job."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        (found,) = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    assert found.state is not None
    return found.state.type.value


# A shell that starts the tests in the background lets them ignore SIGINT, and all that they start.
RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from batchllm_flows.flows import batch_inference
from batchllm_flows.job import BatchJob

if __name__ == "__main__":
    batch_inference(BatchJob.model_validate_json(open(sys.argv[1]).read()))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_and_its_engines_and_keeps_what_was_finished(
    tmp_path: Path,
    tiny_llama: str,
    told_engine: Callable[..., str],
    group_is_gone: Callable[[int], bool],
    number: signal.Signals,
) -> None:
    from prefect.settings import get_current_settings

    submitted = tmp_path / "submitted"
    slow = a_job(
        tmp_path, tiny_llama, engine_python=told_engine(step_seconds=0.2, submitted=str(submitted)), part_seconds=0.1
    )
    (tmp_path / "job.json").write_text(json.dumps(slow.model_dump(mode="json")))
    (tmp_path / "run.py").write_text(RUN)
    environment = os.environ | {
        "PREFECT_API_URL": str(get_current_settings().api.url),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with (tmp_path / "run.log").open("wb") as log:
        run = subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "job.json")],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (parts := list((tmp_path / "out").glob(f"{WORK_FOLDER}/*/{RESULTS_FOLDER}/part-*"))):
            assert time.monotonic() < deadline, (tmp_path / "run.log").read_text()
            assert run.poll() is None, (tmp_path / "run.log").read_text()
            time.sleep(0.05)
        run.send_signal(number)
        assert run.wait(60) != 0
        assert state_of_run(slow.name) == "CRASHED", (tmp_path / "run.log").read_text()
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    engine = int(submitted.read_text().split()[0])
    assert group_is_gone(engine)
    assert not Store(f"{tmp_path}/out").exists(MANIFEST_FILE)
    assert parts

    quick = told_engine()
    report = batch_inference(
        slow.model_copy(update={"execution": slow.execution.model_copy(update={"engine_python": quick})})
    )
    assert 0 < report.computed_requests < 79
    assert (report.rows_out, report.rows_error) == (80, 0)
