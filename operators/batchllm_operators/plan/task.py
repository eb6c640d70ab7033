"""The plan step as a Prefect task."""

# No `from __future__ import annotations` here: it breaks `serve` of an imported flow (Prefect 3.7).
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from batchllm_operators.cost import Calibration
from batchllm_operators.plan.markdown import plan_markdown
from batchllm_operators.plan.plots import forest_plot
from batchllm_operators.plan.shared_attention import EngineAttention
from batchllm_operators.plan.step import plan_staged
from batchllm_operators.records import AttentionForecast, PlanSummary, StageSummary
from batchllm_operators.retry import RETRIES, RETRY_DELAYS_SECONDS, retry_transient
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.planning import CostModel, PlanningSpec
from batchllm_operators.svg import markdown_image
from batchllm_operators.wording import artifact_slug


@task(
    task_run_name="plan",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=retry_transient,
)
def plan(
    stage: StageSummary,
    planning: PlanningSpec,
    work_uri: str,
    storage: StorageOptions,
    engines: int = 1,
    calibrated: Calibration | None = None,
    default: CostModel | None = None,
    usd_per_engine_hour: float | None = None,
    pilot: bool = False,
    attention: EngineAttention | AttentionForecast | None = None,
    job_name: str = "batch-inference",
) -> PlanSummary:
    """Group, order and pack the requests that remain; written to `plan/` of the work folder, shown as an artifact.

    Args:
        stage: what staging found.
        planning: the planning part of the job.
        work_uri: the work folder.
        storage: how to reach it.
        engines: the number of engines that will take bundles.
        calibrated: measured rates of one engine.
        default: the rates where nothing was measured, as `default_rates` makes them.
        usd_per_engine_hour: price of one engine, for the forecast.
        pilot: plan a sample first, see `plan_requests`.
        attention: of the engines, or its forecast, see `plan_requests`.
        job_name: for the artifact's key.

    Raises:
        TerminalError: a staged part is missing or damaged.
        TransientError: after the retries.
    """
    summary = plan_staged(
        stage,
        planning,
        work_uri,
        storage,
        engines=engines,
        calibrated=calibrated,
        default=default,
        usd_per_engine_hour=usd_per_engine_hour,
        pilot=pilot,
        attention=attention,
        log=get_run_logger().info,
    )
    shown = [plan_markdown(summary), *markdown_image("What is shared, and by how many", forest_plot(summary))]
    create_markdown_artifact(
        "\n".join(shown), key=f"{artifact_slug(job_name)}-plan", description="What the job will compute"
    )
    return summary
