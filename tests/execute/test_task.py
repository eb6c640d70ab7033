from __future__ import annotations

from typing import Any

import pytest
from prefect import flow, unmapped
from prefect.runtime import task_run
from prefect.task_runners import ThreadPoolTaskRunner

from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.messages import BundleCounts
from batchllm_operators.execute.pool import EnginePool
from batchllm_operators.execute.progress import ProgressBoard
from batchllm_operators.execute.task import execute_bundle
from batchllm_operators.records import BundleInfo, BundleResult


class ToldPool(EnginePool):
    """Raises what the test says before it succeeds; no real engine fails on demand."""

    def __init__(self, faults: list[Exception]) -> None:
        self.faults = faults
        self.calls = 0
        self.task_runs: list[str] = []

    def run_bundle(self, bundle: BundleInfo, on_progress: Any) -> BundleResult:
        self.calls += 1
        self.task_runs.append(task_run.name)
        on_progress(bundle.name, BundleCounts())
        if self.faults:
            raise self.faults.pop(0)
        return BundleResult(
            bundle=bundle.name,
            requests=bundle.requests,
            errors=0,
            prompt_tokens=1,
            cached_tokens=0,
            completion_tokens=1,
            parts=(),
            load_seconds=0,
            seconds=1,
        )


def run_all(bundles: list[BundleInfo], pool: ToldPool) -> list[BundleResult]:
    @flow(name="execute", task_runner=ThreadPoolTaskRunner(max_workers=1))
    def execute() -> list[BundleResult]:
        attempts = execute_bundle.with_options(retries=2, retry_delay_seconds=0)
        numbers = list(range(1, len(bundles) + 1))
        board = ProgressBoard(bundles)
        return attempts.map(bundles, unmapped(pool), unmapped(board.update), numbers, unmapped(len(bundles))).result()

    return execute()


def test_bundles_are_mapped_over_task_runs_that_say_which_bundle_of_how_many_they_compute(
    prefect_server: None, work: Any
) -> None:
    bundles = [work.write_bundle("mapped-1"), work.write_bundle("mapped-2")]
    pool = ToldPool([])
    results = run_all(bundles, pool)
    assert [result.bundle for result in results] == [bundle.name for bundle in bundles]
    assert sorted(pool.task_runs) == ["execute bundle 1 of 2, 12 requests", "execute bundle 2 of 2, 12 requests"]


def test_a_transient_error_is_tried_again(prefect_server: None, work: Any) -> None:
    pool = ToldPool([TransientError("engine died"), TransientError("engine died")])
    assert len(run_all([work.write_bundle()], pool)) == 1
    assert pool.calls == 3


def test_a_terminal_error_is_not_tried_again(prefect_server: None, work: Any) -> None:
    pool = ToldPool([TerminalError("model.id: no such folder")])
    with pytest.raises(TerminalError, match="no such folder"):
        run_all([work.write_bundle()], pool)
    assert pool.calls == 1
