"""The Prefect task of this step: one task run per bundle."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from batchllm_operators.cost import Calibration
from batchllm_operators.execute.calibration import MOST_SECONDS
from batchllm_operators.execute.calibration_cache import CalibrationCache
from batchllm_operators.execute.handle import ProgressCallback
from batchllm_operators.execute.pool import EnginePool
from batchllm_operators.records import BundleInfo, BundleResult
from batchllm_operators.retry import retry_transient
from batchllm_operators.specs.planning import CostModel
from batchllm_operators.wording import counted


@task(
    name="calibrate engine",
    task_run_name="calibrate engine",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=retry_transient,
)
def calibrate_engine(
    pool: EnginePool, cache: CalibrationCache, seconds: float = MOST_SECONDS, default: CostModel | None = None
) -> Calibration | None:
    """Load one engine, let it measure its rates, and keep them; the engine stays warm for the first bundle.

    Args:
        pool: the engines of this run.
        cache: where calibrations of its model and settings are kept.
        seconds: that the measurement may take, see `calibration_budget`.
        default: rates for what there is no time to measure.
    """
    calibration = pool.calibrate(seconds, default)
    if calibration is not None:
        cache.keep(calibration)
    return calibration


def _run_name() -> str:
    parameters: dict[str, Any] = task_run.parameters
    requests = counted(parameters["bundle"].requests, "request")
    return f"execute bundle {parameters['number']:,} of {parameters['bundles']:,}, {requests}"


@task(
    name="execute bundle",
    task_run_name=_run_name,
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=retry_transient,
)
def execute_bundle(
    bundle: BundleInfo,
    pool: EnginePool,
    on_progress: ProgressCallback,
    number: int = 1,  # noqa: ARG001 - in the name of the task run
    bundles: int = 1,  # noqa: ARG001 - in the name of the task run
) -> BundleResult:
    """Compute one bundle on the next free engine of the pool.

    How often a `TransientError` is tried again is the flow's to say: `execute_bundle.with_options(retries=...)`. The
    first death of an engine on a bundle is such an error; the second is not, because that attempt itself goes on to
    find the request that kills engines, see `EnginePool.run_bundle`. So one retry is enough for that search, and the
    engines that it costs are no retries.

    Args:
        bundle: one bundle of the plan.
        pool: the engines of this run; in `.map`, wrapped in `prefect.unmapped`.
        on_progress: takes the bundle's name and its counts so far, e.g. `ProgressBoard.update`.
        number: of this bundle in the plan, from 1 on, for the name of the task run.
        bundles: of the plan, for that name.
    """
    return pool.run_bundle(bundle, on_progress)
