"""Gives the bundles of a plan to the engines of a run, one task run each, and has an engine measure its rates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

from prefect import unmapped
from prefect.futures import as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from batchllm_operators.cost import Calibration
from batchllm_operators.errors import BatchLLMError, TerminalError
from batchllm_operators.execute.backends import open_backend
from batchllm_operators.execute.bundle_runner import BundleRunner
from batchllm_operators.execute.calibration import calibration_budget
from batchllm_operators.execute.calibration_cache import CalibrationCache
from batchllm_operators.execute.driver import Deadlines, StatusCallback
from batchllm_operators.execute.engine_ahead import take_engine_ahead
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.engines_in_context import fleet_in_context, runner_in_context
from batchllm_operators.execute.fleet import THREADS_PER_ENGINE, EngineFleet
from batchllm_operators.execute.progress import ProgressBoard
from batchllm_operators.execute.task import calibrate_engine, execute_bundle
from batchllm_operators.records import BundleInfo, BundleResult
from batchllm_operators.specs.execution import ExecutionSpec
from batchllm_operators.specs.planning import CostModel
from batchllm_operators.store import Store

LiveDisplay = Callable[[ProgressBoard], AbstractContextManager[object]]
"""Makes what shows a board while bundles run."""

_LOGGER = logging.getLogger(__name__)


@contextmanager
def open_engines(
    execution: ExecutionSpec, work: Store, *, on_status: StatusCallback, log_error: Callable[..., None] = _LOGGER.error
) -> Iterator[EngineFleet]:
    """The engines of a run, warm until the block ends; the tasks inside it find them by their `EngineWork`.

    Where the block fails, the end of the engines' logs is kept in the work folder.

    Args:
        execution: where engines run, and how many.
        work: the work folder.
        on_status: told what the engines do until their first tokens.
        log_error: takes the places of the logs, as `logging.Logger.error`.

    Raises:
        TerminalError: the job asks for more than there is.
    """
    ahead = take_engine_ahead(execution)
    deadlines = Deadlines(load_s=execution.load_timeout_s, stall_s=execution.stall_timeout_s)
    with ExitStack() as ending:
        if ahead is None:
            fleet = EngineFleet(open_backend(execution), deadlines, on_status=on_status)
        else:
            fleet = EngineFleet(ahead.backend, deadlines, on_status=on_status, started=ahead.link)
        ending.enter_context(fleet)
        ending.enter_context(_closed_on_failure(fleet, work, log_error))
        ending.enter_context(fleet_in_context(execution, fleet))
        yield fleet


@contextmanager
def _closed_on_failure(fleet: EngineFleet, work: Store, log_error: Callable[..., None]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if kept := fleet.close(keep_logs=work):
            log_error("the end of the engine's log is kept: %s", ", ".join(kept))
        raise


def measured_rates(
    fleet: EngineFleet,
    work: EngineWork,
    cache: CalibrationCache,
    *,
    forecast_seconds: float,
    default: CostModel,
    log: Callable[..., None] = _LOGGER.info,
) -> Calibration | None:
    """Let an engine measure its rates, where the job is long enough to be worth it, and keep them.

    Where it is not, the model begins to load while the caller goes on.

    Args:
        fleet: the engines.
        work: what they load.
        cache: where calibrations of this model and these settings are kept.
        forecast_seconds: of the whole job, by the hardware's default rates.
        default: rates for what there is no time to measure.
        log: takes a line where nothing is measured, as `logging.Logger.info`.
    """
    seconds = calibration_budget(forecast_seconds)
    if seconds is None:
        log("no calibration: by the hardware's default rates the whole job takes %.0f s", forecast_seconds)
        fleet.preload(work.load)
        return None
    calibration = calibrate_engine.with_options(retries=work.execution.retries)(work, seconds, default)
    if calibration is not None:
        cache.keep(calibration)
    return calibration


def run_bundles(
    bundles: tuple[BundleInfo, ...],
    fleet: EngineFleet,
    work: EngineWork,
    *,
    live: LiveDisplay,
    proven: bool = False,
) -> tuple[BundleResult, ...]:
    """Compute the bundles of a plan: one task run each, in a thread that waits for its engine.

    A bundle that fails for now does not end the others: what they finish need not be computed again. A failure that
    lasts does. Where this fails, the fleet closes before the task runner: closing ends the calls that the runner's
    threads wait in, which Prefect cannot interrupt (Ctrl-C, cancellation, a failed bundle).

    Args:
        bundles: in the order in which engines take them.
        fleet: the engines.
        work: what they load, and how they compute.
        live: shows how far they are.
        proven: whether an engine of this run has answered a request before, see `BundleRunner`.

    Raises:
        TerminalError: of the first bundle that can never be computed.
        TransientError: of a bundle that failed more often than `execution.retries` allows, after all others are done.
    """
    if not bundles:
        return ()
    board = ProgressBoard(bundles)
    runner = BundleRunner(fleet, work, board.update, proven=proven)
    bundle_task = execute_bundle.with_options(retries=work.execution.retries)
    threads = min(THREADS_PER_ENGINE * fleet.engines, len(bundles))
    with (
        runner_in_context(runner),
        ThreadPoolTaskRunner[Any](max_workers=threads) as task_runner,
        _ended_on_failure(fleet),
        live(board),
    ):
        futures = task_runner.map(
            bundle_task,
            {
                "bundle": list(bundles),
                "work": unmapped(work),
                "number": list(range(1, len(bundles) + 1)),
                "bundles": unmapped(len(bundles)),
            },
        )
        results: list[BundleResult] = []
        failed: BatchLLMError | None = None
        for future in as_completed(list(futures)):
            try:
                results.append(cast(BundleResult, future.result()))
            except TerminalError:
                raise
            except BatchLLMError as error:
                failed = error
        if failed is not None:
            raise failed
        return tuple(results)


@contextmanager
def _ended_on_failure(fleet: EngineFleet) -> Iterator[None]:
    try:
        yield
    except BaseException:
        fleet.end_engines()
        raise
