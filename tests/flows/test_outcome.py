"""What a flow run ends with: its message, its result, what it leaves behind. No engine is needed for any of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prefect import flow
from prefect.client.orchestration import get_client

from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_flows.job import BatchJob
from batchllm_flows.report import JobReport
from batchllm_operators.errors import TerminalError
from batchllm_operators.store import Store
from batchllm_operators.work.layout import LAST_ERROR_FILE, MANIFEST_FILE
from tests.commands.job_folders import answer, complete, planned_job, write_job
from tests.flows.jobs import job, questions, read_output, write_input

pytestmark = pytest.mark.usefixtures("prefect_server")


def message_of_run(state: Any) -> str:
    with get_client(sync_client=True) as client:
        return str(client.read_flow_run(state.state_details.flow_run_id).state.message)


def answered_job(folder: Path, model: str, *, failed: int = 0) -> BatchJob:
    """A job whose requests are all answered by an earlier run, the last few by an error."""
    run, staged = planned_job(write_job(folder, model))
    answer(run, staged, 0, 8 - failed)
    if failed:
        answer(run, staged, 8 - failed, 8, error="out of memory")
        complete(run, staged)
    return run.job


def test_a_run_ends_with_a_message_and_its_report(tmp_path: Path, tiny_llama: str) -> None:
    this_job = answered_job(tmp_path, tiny_llama)
    state = batch_inference(this_job, return_state=True)
    assert state.is_completed()
    assert message_of_run(state).startswith("8 rows, 0 errors, 0 truncated, ")
    assert message_of_run(state).endswith(" % saved")
    assert isinstance(state.result(), JobReport)
    # Again, as a plain call: complete already.
    report = batch_inference(this_job)
    assert isinstance(report, JobReport)
    assert (report.rows_out, report.already_complete) == (8, True)


def test_as_a_subflow_it_returns_its_report_too(tmp_path: Path, tiny_llama: str) -> None:
    this_job = answered_job(tmp_path, tiny_llama)

    @flow
    def outer() -> int:
        return batch_inference(this_job).rows_out

    assert outer() == 8


def test_a_plan_ends_with_a_message_and_its_summary(tmp_path: Path, tiny_llama: str) -> None:
    write_input(str(tmp_path / "in"), questions())
    state = plan_batch_inference(job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama), return_state=True)
    assert message_of_run(state).startswith("39 requests in 1 bundle, 0 errors, ")
    assert state.result().counts.requests == 39


def test_too_many_bad_rows_end_a_run_before_any_engine_is_loaded(tmp_path: Path, tiny_llama: str) -> None:
    table = questions(20)
    texts = [None if index % 2 else text for index, text in enumerate(table["question"].to_pylist())]
    write_input(str(tmp_path / "in"), table.set_column(2, "question", pa.array(texts, pa.string())))
    no_engine = {"engine_python": str(tmp_path / "no-python"), "calibrate": False}
    this_job = job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama, execution=no_engine)
    with pytest.raises(TerminalError, match=r"10 of 20 rows have errors.*invalid_row 10; row row-1: .*row row-5: "):
        batch_inference(this_job)
    assert not Store(str(tmp_path / "out")).exists(MANIFEST_FILE)
    names = Store(str(tmp_path / "out")).names()
    assert [name.rpartition("/")[2] for name in names if name.endswith(LAST_ERROR_FILE)] == [LAST_ERROR_FILE]


def test_errors_of_the_engine_are_computed_again_and_the_output_is_written_anew(
    tmp_path: Path, tiny_llama: str
) -> None:
    this_job = answered_job(tmp_path, tiny_llama, failed=2)
    out = str(tmp_path / "out")
    assert read_output(out)["error"].null_count == 6
    assert batch_inference(this_job).already_complete

    # What an engine would compute now is there already, so that the test needs none.
    run, staged = planned_job(tmp_path / "job.yaml")
    answer(run, staged, 6, 8)
    report = batch_inference(this_job, retry_errors=True)

    assert (report.rows_out, report.rows_error, report.already_complete) == (8, 0, False)
    assert read_output(out)["completion"].to_pylist() == ["yes"] * 8
    assert batch_inference(this_job, retry_errors=True).already_complete
