"""The examples run as they stand, but for the model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import orjson
import pytest

from batchllm_flows.demo.run import demo_job, write_input
from batchllm_flows.flows import batch_inference, plan_batch_inference
from batchllm_flows.job import BatchJob
from batchllm_operators.store import Store

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.engine
def test_the_local_job_answers_every_review(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: None
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    changes = {"model.id": smollm2, "model.engine_args.enforce_eager": True, "sink.uri": str(tmp_path / "out")}
    report = batch_inference(BatchJob.from_file("examples/jobs/local.yaml", changes))
    assert (report.rows_out, report.rows_error, report.duplicate_rows) == (8, 0, 1)
    (output,) = (tmp_path / "out").glob("part-*.jsonl")
    answers = [orjson.loads(line) for line in output.read_bytes().splitlines()]
    assert [answer["id"] for answer in answers] == [f"r{number:02d}" for number in range(1, 9)]
    assert all(answer["completion"].strip() for answer in answers)


def test_the_s3_job_is_valid() -> None:
    job = BatchJob.from_file(EXAMPLES / "jobs" / "s3_to_s3.yaml")
    assert job.execution.engines == 8


@pytest.mark.engine
def test_a_pipeline_composes_the_job_as_a_subflow(tiny_llama: str, tmp_path: Path, prefect_server: None) -> None:
    spec = importlib.util.spec_from_file_location("compose_in_a_pipeline", EXAMPLES / "compose_in_a_pipeline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.describe_cities(str(tmp_path), tiny_llama) == 4


def test_the_catalogue_of_the_demo_has_what_the_demo_shows_whatever_was_imported_before() -> None:
    import logging

    from batchllm_flows.demo.catalogue import fresh_catalogue

    catalogue = fresh_catalogue()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "debug", lambda: None)
        assert catalogue.equals(fresh_catalogue())
    assert catalogue.num_rows >= 50
    assert len(set(catalogue["module"].to_pylist())) >= 8
    assert catalogue["docstring"].null_count == 1
    questions = [tuple(row.values()) for row in catalogue.drop_columns(["name"]).to_pylist()]
    assert len(questions) - len(set(questions)) >= 3
    assert " at 0x" not in "".join(catalogue["signature"].to_pylist())


def test_the_demo_shares_most_of_its_tokens_and_is_computed_in_two_minutes_at_15_gflops(
    smollm2: str, tmp_path: Path, prefect_server: None
) -> None:
    rows = write_input(Store(str(tmp_path / "in")))
    values = demo_job(Path(smollm2))
    values["source"]["uri"], values["sink"]["uri"] = str(tmp_path / "in"), str(tmp_path / "out")
    plan = plan_batch_inference(BatchJob.model_validate(values))
    assert plan.counts.rows == rows
    assert plan.counts.requests == rows - 1 - plan.counts.duplicate_rows
    assert plan.counts.duplicate_rows >= 3
    assert plan.saving.planned >= 0.6
    assert sum(group.requests >= 3 for group in plan.shape.largest_groups) >= 6
    tokens = plan.forecast.computed_prompt_tokens + plan.forecast.output_tokens
    with_attention = 1.07
    assert with_attention * tokens * 2 * 135e6 / 15e9 < 120
