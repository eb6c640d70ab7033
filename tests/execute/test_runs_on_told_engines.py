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
from batchllm_operators.store import Store
from batchllm_operators.work.layout import WORK_FOLDER
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
    (work,) = (folder / "out" / WORK_FOLDER).iterdir()
    return Store(str(work)).names("logs")


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
