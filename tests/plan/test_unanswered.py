"""Whether a job has anything left to compute."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.plan.unanswered import has_requests_left
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from tests.generation import RESULT_SCHEMA
from tests.plan.staged_jobs import stage_prompts

PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5, 6], [7]]


@pytest.fixture
def work(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "work"))


def answer(work: Store, requests: int, *, failed: bool = False) -> None:
    """Results for the first requests of the plan."""
    with work.parquet("plan/bundle-00000.parquet") as file:
        keys = file.read()["request_key"].to_pylist()[:requests]
    error = {"code": "engine_error", "message": "no"} if failed else None
    rows = [
        dict.fromkeys(RESULT_SCHEMA.names)
        | {"request_key": key, "error": error}
        | ({} if failed else {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 1})
        for key in keys
    ]
    work.write_table(f"results/part-{len(work.names('results'))}.parquet", pa.Table.from_pylist(rows, RESULT_SCHEMA))


def test_a_job_has_requests_left_until_each_distinct_one_is_answered_without_error(work: Store) -> None:
    staged = stage_prompts(work, PROMPTS)
    assert plan_requests(work, staged, PlanningSpec()).counts.requests == 3
    assert has_requests_left(work, staged)
    answer(work, 2)
    assert has_requests_left(work, staged)
    answer(work, 3, failed=True)
    assert has_requests_left(work, staged)
    answer(work, 3)
    assert not has_requests_left(work, staged)


def test_a_job_without_requests_has_none_left(work: Store) -> None:
    assert not has_requests_left(work, stage_prompts(work, []))
