"""The whole way of a job on real parts: S3 server, Prefect, vLLM on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from prefect.artifacts import Artifact

from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_flows.html_report.step_trace import read_step_trace
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.backends.inline import Script
from batchllm_operators.machine.processor import processor
from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.records import PlanSummary
from batchllm_operators.store import Store
from batchllm_operators.work.layout import MANIFEST_FILE, PLAN_SUMMARY, REPORT_PAGE, RESULTS_FOLDER
from tests.conftest import InlineEngines
from tests.flows.jobs import job, questions, read_output, write_input

pytestmark = pytest.mark.usefixtures("prefect_server")


def artifact_types() -> dict[str, str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {str(found.key): str(found.type) for found in client.read_artifacts()}


@pytest.mark.engine
def test_a_job_from_s3_to_s3_answers_every_row_in_order_once(bucket: str, tiny_llama: str) -> None:
    rows = questions()
    write_input(f"{bucket}/in", rows)
    this_job = job(f"{bucket}/in", f"{bucket}/out", tiny_llama)

    report = batch_inference(this_job)

    output = read_output(f"{bucket}/out")
    assert output.select(rows.column_names).equals(rows)
    assert output.column_names[-6:] == [
        "completion", "finish_reason", "error", "prompt_tokens", "cached_tokens", "completion_tokens",
    ]  # fmt: skip
    assert output["error"].null_count == output.num_rows
    assert set(output["completion_tokens"].to_pylist()) <= set(range(1, 7))
    assert output["completion"][0] == output["completion"][1]
    assert (report.rows_in, report.rows_out, report.rows_error, report.duplicate_rows) == (40, 40, 0, 1)
    assert report.saving >= 0.98 * report.optimum_saving > 0.5
    assert {"questions-progress": "progress", "questions-report": "markdown"}.items() <= artifact_types().items()
    assert "markdown" in {kind for key, kind in artifact_types().items() if "plan" in key}

    # Our scheduler ran, and says step by step what it did.
    settings = {one.name: one.value for one in report.engine_settings}
    assert settings["scheduler_cls"].endswith("BatchLLMScheduler")
    assert settings["dtype"] == ("bfloat16" if processor().fast_bf16 else "float32")
    assert settings["block_size"] == str(planned_block_size(this_job.planning))
    trace, unreadable = read_step_trace(Store(report.work_uri, this_job.sink.storage), since=0.0)
    assert trace is not None
    assert not unreadable
    # A completion's first token comes out of its prefill.
    assert trace.tokens == report.computed_prompt_tokens + report.completion_tokens - report.computed_requests

    # The same job again finds its output complete; under another sink mode too.
    again = batch_inference(this_job)
    assert again.already_complete
    assert again.computed_requests == 0

    # Another job does not overwrite it unasked, and does when asked.
    with pytest.raises(TerminalError, match="overwrite"):
        batch_inference(job(f"{bucket}/in", f"{bucket}/out", tiny_llama, sampling={"max_tokens": 3}))
    replaced = batch_inference(
        job(f"{bucket}/in", f"{bucket}/out", tiny_llama, sampling={"max_tokens": 3}, sink__mode="overwrite")
    )
    assert replaced.job_id != report.job_id
    assert max(read_output(f"{bucket}/out")["completion_tokens"].to_pylist()) == 3


def test_an_interrupted_job_computes_only_what_is_missing(
    tmp_path: Path, tiny_llama: str, inline_engines: InlineEngines
) -> None:
    inline_engines.script = Script(answer=lambda request: str(request.prompt_token_ids))
    write_input(str(tmp_path / "in"), questions())
    # The lost answers would be found among those that are kept for later runs.
    changes = {"execution__backend": "inline", "execution__reuse": "none"}
    this_job = job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama, **changes)
    first = batch_inference(this_job)
    answers = read_output(first.output_uri)
    sink, work = Store(first.output_uri), Store(first.work_uri)
    parts = work.names(RESULTS_FOLDER)
    with work.parquet(parts[0]) as part:
        lost = part.metadata.num_rows
    assert len(parts) > 1
    work.delete(parts[:1])
    sink.delete([MANIFEST_FILE, *(name for name in sink.names() if name.startswith("part-"))])

    second = batch_inference(this_job)

    assert second.computed_requests == lost
    assert read_output(first.output_uri)["completion"].equals(answers["completion"])


def test_bad_rows_become_row_errors_and_the_job_goes_on(
    bucket: str, tiny_llama: str, inline_engines: InlineEngines
) -> None:
    lines = [orjson.dumps(row) for row in questions(60).to_pylist()]
    lines[5] = b'{"id": "broken"'
    lines[7] = b'{"id": "bytes", "document": "\xff", "question": "?"}'
    lines[9] = orjson.dumps({"id": "long", "document": "word " * 4000, "question": "?"})
    Store(f"{bucket}/in").write_bytes("rows.jsonl", b"\n".join(lines))
    changes = {"source": {"uri": f"{bucket}/in/rows.jsonl", "format": "jsonl"}, "sink__format": "parquet"}
    settings = {"max_error_fraction": 0.05, "backend": "inline"}

    report = batch_inference(job("", f"{bucket}/out", tiny_llama, **changes, execution=settings))

    assert report.error_rows == {"invalid_row": 2, "prompt_too_long": 1}
    output = read_output(f"{bucket}/out").to_pylist()
    assert len(output) == 60
    assert "rows.jsonl line 6" in output[5]["error"]["message"]
    assert "rows.jsonl line 8" in output[7]["error"]["message"]
    assert "2048" in output[9]["error"]["message"]
    assert [row["completion"] is None for row in output].count(True) == 3


def test_too_many_bad_rows_fail_the_job_and_leave_nothing_that_looks_complete(tmp_path: Path, tiny_llama: str) -> None:
    table = questions(20)
    nothing = pa.array([None] * 20, pa.string())
    write_input(str(tmp_path / "in"), table.set_column(2, "question", nothing))
    with pytest.raises(TerminalError, match=r"20 of 20 rows.*invalid_row"):
        batch_inference(job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama))
    assert not Store(str(tmp_path / "out")).exists(MANIFEST_FILE)


def test_an_empty_dataset_gives_an_empty_complete_output(bucket: str, tiny_llama: str) -> None:
    write_input(f"{bucket}/in", questions(2).slice(0, 0), files=1)
    report = batch_inference(job(f"{bucket}/in", f"{bucket}/out", tiny_llama))
    assert (report.rows_in, report.rows_out, report.bundles) == (0, 0, 0)
    assert read_output(f"{bucket}/out").num_rows == 0


def test_planning_alone_starts_no_engine_and_forecasts(tmp_path: Path, tiny_llama: str) -> None:
    write_input(str(tmp_path / "in"), questions())
    summary = plan_batch_inference(job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama))
    assert summary.counts.requests == 39
    assert summary.saving.planned == pytest.approx(summary.saving.optimum)
    assert not Store(str(tmp_path / "out")).exists(MANIFEST_FILE)
    assert summary.page_uri is not None
    assert "The first levels of the prefix forest" in Path(summary.page_uri).read_text()
    shown = Artifact.get("questions-plan")
    assert shown is not None
    assert "](data:image/svg+xml;base64," in str(shown.data)


def test_a_page_that_cannot_be_written_fails_no_job(tmp_path: Path, tiny_llama: str) -> None:
    write_input(str(tmp_path / "in"), questions())
    this_job = job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama)
    page_uri = plan_batch_inference(this_job).page_uri
    assert page_uri is not None
    Path(page_uri).unlink()
    Path(page_uri).mkdir()
    again = plan_batch_inference(this_job)
    assert (again.page_uri, again.counts.requests) == (None, 39)


def test_faults_before_any_work_say_what_to_mend(bucket: str, tmp_path: Path, tiny_llama: str) -> None:
    write_input(f"{bucket}/in", questions(4))
    out = f"{bucket}/out"
    with pytest.raises(TerminalError, match=r"no object matches"):
        batch_inference(job(f"{bucket}/nothing-here", out, tiny_llama))
    with pytest.raises(TerminalError, match=r"titel.*document.*question"):
        batch_inference(job(f"{bucket}/in", out, tiny_llama, prompt={"kind": "chat", "user": "{{ titel }}"}))
    with pytest.raises(TerminalError, match=r"no-such-model"):
        batch_inference(job(f"{bucket}/in", out, str(tmp_path / "no-such-model")))
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with pytest.raises(TerminalError, match=rf"bucket does not exist.*{endpoint}.*no-such-bucket"):
        batch_inference(job("s3://no-such-bucket/in", out, tiny_llama))


@pytest.mark.engine
def test_a_pilot_sample_is_computed_first_and_teaches_the_plan(tmp_path: Path, tiny_llama: str) -> None:
    write_input(str(tmp_path / "in"), questions(60))
    changes = {"planning": {"pilot_fraction": 0.2}, "execution__usd_per_gpu_hour": 3.0}
    report = batch_inference(job(str(tmp_path / "in"), str(tmp_path / "out"), tiny_llama, **changes))
    assert (report.rows_out, report.rows_error, report.computed_requests) == (60, 0, 59)
    assert report.bundles >= 2
    assert report.forecast.usd is not None
    assert min(report.forecast.usd.expected, report.forecast.usd.actual) > 0
    computed = report.forecast.computed_prompt_tokens
    assert 0 < computed.actual <= computed.expected, "the second plan does not count on what the pilot cached"
    assert Store(report.work_uri).exists(REPORT_PAGE)
    summary = PlanSummary.model_validate_json(Store(report.work_uri).read_bytes(PLAN_SUMMARY))
    assert not summary.pilot
    assert 0 < summary.counts.done_requests < 59


@pytest.mark.engine
def test_a_real_model_answers_with_text_of_the_right_kind(tmp_path: Path, smollm2: str) -> None:
    cities = pa.table({"country": ["France", "Italy", "Japan"], "capital": ["Paris", "Rome", "Tokyo"]})
    write_input(str(tmp_path / "in"), cities, files=1)
    batch_inference(
        job(
            str(tmp_path / "in"),
            str(tmp_path / "out"),
            smollm2,
            source={"uri": str(tmp_path / "in"), "format": "parquet"},
            prompt={"kind": "chat", "user": "What is the capital of {{ country }}? Answer in one short sentence."},
            sampling={"max_tokens": 24},
        )
    )
    for row in read_output(str(tmp_path / "out")).to_pylist():
        assert row["capital"] in row["completion"]
        assert row["finish_reason"] == "stop"
