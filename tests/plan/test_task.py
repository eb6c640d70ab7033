"""The plan step as a Prefect task."""

from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client

from batchllm_operators.plan.task import plan
from batchllm_operators.records import PlanSummary, StageSummary
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from tests.plan.staged_jobs import stage_prompts


@pytest.mark.usefixtures("prefect_server")
def test_the_task_plans_and_publishes_the_plan(tmp_path: Path) -> None:
    staged = stage_prompts(Store(str(tmp_path)), [[1] * 70 + [number] for number in range(6)])

    @flow
    def planning(staged: StageSummary) -> PlanSummary:
        return plan(staged, PlanningSpec(), str(tmp_path), StorageOptions(), engines=2, job_name="Nightly Run")

    summary = planning(staged)
    assert (summary.counts.requests, summary.shape.workers) == (6, 2)
    with get_client(sync_client=True) as client:
        pages = [artifact.data for artifact in client.read_artifacts() if artifact.key == "nightly-run-plan"]
    assert any("need not be computed" in str(page) for page in pages)
