"""The Prefect tasks of this step: one task run per bundle, and one that measures an engine."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from batchllm_operators.cost import Calibration
from batchllm_operators.execute.calibration import MOST_SECONDS
from batchllm_operators.execute.engine_work import EngineWork
from batchllm_operators.execute.engines_in_context import fleet_of, runner_of
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
    work: EngineWork, seconds: float = MOST_SECONDS, default: CostModel | None = None
) -> Calibration | None:
    """Load one engine and let it measure its rates; the engine stays warm for the first bundle.

    None when its model gives nothing to measure, and when the engine was warm already.

    Args:
        work: what the engines of this run load.
        seconds: that the measurement may take, see `calibration_budget`.
        default: rates for what there is no time to measure; None: the hardware's.
    """
    how = {"calibrate": True, "calibration_seconds": seconds, "default_rates": default}
    loaded = fleet_of(work).load_one(work.load.model_copy(update=how))
    return None if loaded is None else loaded.calibration


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
    work: EngineWork,
    number: int = 1,  # noqa: ARG001 - in the name of the task run
    bundles: int = 1,  # noqa: ARG001 - in the name of the task run
) -> BundleResult:
    """Compute one bundle on the next free engine of the flow that this task runs in.

    How often a `TransientError` is tried again is the flow's to say: `execute_bundle.with_options(retries=...)`. The
    first death of an engine on a bundle is such an error; the second is not, because that attempt itself goes on to
    find the request that kills engines, see `BundleRunner.run`. So one retry is enough for that search, and the
    engines that it costs are no retries.

    Args:
        bundle: one bundle of the plan.
        work: what the engines of this run load, and how they compute; in `.map`, wrapped in `prefect.unmapped`.
        number: of this bundle in the plan, from 1 on, for the name of the task run.
        bundles: the number of bundles in the plan, for that name.
    """
    return runner_of(work).run(bundle)
