"""The tasks find the engines of their flow, try again what may pass, and say in their names what they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow, unmapped
from prefect.runtime import task_run
from prefect.task_runners import ThreadPoolTaskRunner

from batchllm_operators.cost import CPU_DEFAULT, Calibration
from batchllm_operators.errors import TerminalError, TransientError
from batchllm_operators.execute.bundle_runner import BundleRunner
from batchllm_operators.execute.driver import Deadlines
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.engines_in_context import fleet_in_context, runner_in_context
from batchllm_operators.execute.fleet import EngineFleet
from batchllm_operators.execute.task import calibrate_engine, execute_bundle
from batchllm_operators.records import BundleInfo, BundleResult
from tests.execute.told_links import CALIBRATION, ToldBackend, ToldLink


class ToldRunner(BundleRunner):
    """Raises what the test says before it succeeds; no real engine fails on demand."""

    def __init__(self, work: EngineWork, faults: list[Exception]) -> None:
        self._told = work
        self.faults = faults
        self.task_runs: list[str] = []

    @property
    def work(self) -> EngineWork:
        return self._told

    def run(self, bundle: BundleInfo) -> BundleResult:
        self.task_runs.append(task_run.name)
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


def run_all(bundles: list[BundleInfo], runner: ToldRunner) -> list[BundleResult]:
    @flow(name="execute", task_runner=ThreadPoolTaskRunner(max_workers=1))
    def execute() -> list[BundleResult]:
        attempts = execute_bundle.with_options(retries=2, retry_delay_seconds=0)
        numbers = list(range(1, len(bundles) + 1))
        with runner_in_context(runner):
            return attempts.map(bundles, unmapped(runner.work), numbers, unmapped(len(bundles))).result()

    return execute()


def test_bundles_are_mapped_over_task_runs_that_say_which_bundle_of_how_many_they_compute(
    prefect_server: None, work: Any
) -> None:
    bundles = [work.write_bundle("mapped-1"), work.write_bundle("mapped-2")]
    runner = ToldRunner(work.engine_work(), [])
    results = run_all(bundles, runner)
    assert [result.bundle for result in results] == [bundle.name for bundle in bundles]
    assert sorted(runner.task_runs) == ["execute bundle 1 of 2, 12 requests", "execute bundle 2 of 2, 12 requests"]


def test_a_transient_error_is_tried_again(prefect_server: None, work: Any) -> None:
    runner = ToldRunner(work.engine_work(), [TransientError("engine died"), TransientError("engine died")])
    assert len(run_all([work.write_bundle()], runner)) == 1
    assert len(runner.task_runs) == 3


def test_a_terminal_error_is_not_tried_again(prefect_server: None, work: Any) -> None:
    runner = ToldRunner(work.engine_work(), [TerminalError("model.id: no such folder")])
    with pytest.raises(TerminalError, match="no such folder"):
        run_all([work.write_bundle()], runner)
    assert len(runner.task_runs) == 1


@pytest.mark.parametrize("opened", [False, True])
def test_a_bundle_whose_engines_nobody_has_opened_says_where_it_must_run(work: Any, opened: bool) -> None:
    with pytest.raises(TerminalError, match="no bundles are run here: run this task in the process of its flow"):
        if opened:
            with runner_in_context(ToldRunner(work.engine_work(part_rows=9), [])):
                execute_bundle.fn(work.write_bundle(), work.engine_work())
        else:
            execute_bundle.fn(work.write_bundle(), work.engine_work())


@pytest.fixture
def measured_link(work: Any) -> Iterator[ToldLink]:
    link = ToldLink()
    with (
        EngineFleet(ToldBackend([link]), Deadlines(30, 30, 1)) as fleet,
        fleet_in_context(work.engine_work().execution, fleet),
    ):
        yield link


def test_an_engine_is_told_how_long_to_measure_and_what_to_assume_else(work: Any, measured_link: ToldLink) -> None:
    measured: Calibration | None = calibrate_engine.fn(work.engine_work(), 7.5, CPU_DEFAULT)
    assert measured == CALIBRATION
    assert [(load.calibration_seconds, load.default_rates) for load in measured_link.loads] == [(7.5, CPU_DEFAULT)]
    assert calibrate_engine.fn(work.engine_work(), 7.5, CPU_DEFAULT) is None
