"""Whole runs of the flow on an engine process without a model: what is told of engines, and when they are loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from batchllm_flows.flows import batch_inference
from batchllm_flows.job import BatchJob
from batchllm_operators.errors import TerminalError
from batchllm_operators.execute.engine_ahead import engine_ahead
from batchllm_operators.plan import shared_attention
from batchllm_operators.records import PlanSummary
from batchllm_operators.store import Store
from batchllm_operators.work.job_file import work_folders_in
from batchllm_operators.work.layout import PLAN_SUMMARY, WORK_FOLDER
from tests.flows.jobs import job, questions, write_input

pytestmark = pytest.mark.usefixtures("prefect_server")

TellEngine = Callable[..., str]


@pytest.fixture
def told_lines() -> Iterator[list[str]]:
    """What flow runs log; taken at their logger, once Prefect has set it up."""
    from prefect.logging.configuration import setup_logging

    setup_logging()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("prefect.flow_runs")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def a_job(folder: Path, model: str, python: str, rows: pa.Table, **execution: object) -> BatchJob:
    write_input(str(folder / "in"), rows)
    settings = {"calibrate": False, "engine_python": python} | execution
    return job(str(folder / "in"), str(folder / "out"), model, execution=settings)


def logs_kept(folder: Path) -> list[str]:
    (work,) = work_folders_in(root := Store(str(folder / "out" / WORK_FOLDER)))
    return root.folder(work).names("logs")


def test_a_run_tells_what_its_engine_does_and_shows_what_came_out(
    tmp_path: Path, tiny_llama: str, told_engine: TellEngine, told_lines: list[str]
) -> None:
    this_job = a_job(tmp_path, tiny_llama, told_engine(), questions(12))
    with engine_ahead(this_job.execution):
        report = batch_inference(this_job)
    of_engines = [line for line in told_lines if line.startswith("engine 0: ")]
    assert of_engines[0].startswith("engine 0: environment (importing vLLM), log: /")
    assert any(line.startswith("engine 0: weights") for line in of_engines)
    assert of_engines[-1].startswith("engine 0: first tokens")
    assert logs_kept(tmp_path) == []
    assert report.samples is not None
    assert (report.truncated_rows, len(report.samples.answers)) == (12, 3)
    assert report.samples.answers[0].row_id == "row-0"
    assert report.outline is not None
    assert (report.outline.input_objects, report.outline.prompt_kind) == (2, "chat")
    assert 0 <= report.engine_wait_seconds < 30


def test_a_run_that_fails_keeps_the_end_of_its_engines_log_and_says_where(
    tmp_path: Path, tiny_llama: str, told_engine: TellEngine, told_lines: list[str]
) -> None:
    python = told_engine(load_fault="no luck", prints="what it printed before")
    with pytest.raises(TerminalError, match=r"no luck(.|\n)*what it printed before"):
        batch_inference(a_job(tmp_path, tiny_llama, python, questions(4)))
    assert logs_kept(tmp_path) == ["logs/engine-0.log"]
    assert any("log is kept: " in line and line.endswith("logs/engine-0.log") for line in told_lines)


@pytest.mark.parametrize("max_error_fraction", [0.5, 1.0])
def test_no_model_is_loaded_where_nothing_is_to_compute_or_too_many_rows_are_bad(
    tmp_path: Path, tiny_llama: str, told_engine: TellEngine, told_lines: list[str], max_error_fraction: float
) -> None:
    rows = questions(4).set_column(2, "question", pa.nulls(4, pa.string()))
    python = told_engine(load_fault="a model was loaded", prints="")
    this_job = a_job(tmp_path, tiny_llama, python, rows, max_error_fraction=max_error_fraction)
    with engine_ahead(this_job.execution):
        if max_error_fraction == 1.0:
            assert batch_inference(this_job).rows_error == 4
        else:
            with pytest.raises(TerminalError, match="4 of 4 rows"):
                batch_inference(this_job)
    assert not [line for line in told_lines if line.startswith("engine 0: ")]
    assert logs_kept(tmp_path) == []


@pytest.mark.parametrize(("attention", "gpu"), [("auto", True), ("auto", False), ("shared", True)])
def test_engines_get_vllms_own_attention_where_the_plan_says_that_sharing_does_not_pay(
    tmp_path: Path,
    tiny_llama: str,
    told_engine: TellEngine,
    told_lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    attention: str,
    gpu: bool,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0" if gpu else "")
    short_answers = a_job(tmp_path, tiny_llama, told_engine(), questions(12))
    model = short_answers.model.model_copy(update={"attention": attention})
    report = batch_inference(short_answers.model_copy(update={"model": model}))
    (setting,) = report.engine_settings
    said = [line for line in told_lines if line.startswith("Prefix-shared attention (`model.attention: auto`)")]
    planned = PlanSummary.model_validate_json(Store(report.work_uri).read_bytes(PLAN_SUMMARY))
    if attention == "auto" and gpu:
        assert planned.attention is not None
        assert setting.value == "stock"
        assert setting.reason.startswith("model.attention: auto; prefix-shared attention is expected to save ")
        assert setting.reason.endswith("1.0% needed (rates of its kernels: assumed, not measured)")
        assert len(said) == 1
    else:
        assert (setting.value, setting.reason, planned.attention, said) == (attention, "the job", None, [])


def test_engines_get_shared_attention_where_the_plan_says_that_it_pays(
    tmp_path: Path, tiny_llama: str, told_engine: TellEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(shared_attention, "NEEDED_SAVING", -1.0)
    job_of_ours = a_job(tmp_path, tiny_llama, told_engine(), questions(12), calibrate=True)
    model = job_of_ours.model.model_copy(update={"attention": "auto"})
    report = batch_inference(job_of_ours.model_copy(update={"model": model}))
    (setting,) = report.engine_settings
    assert (setting.value, setting.reason) == ("auto", "the job")
