"""The plan step as a call: learns from earlier runs, plans, and says what came out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from batchllm_operators.cost import Calibration
from batchllm_operators.plan.earlier import earlier_runs
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.plan.shared_attention import EngineAttention
from batchllm_operators.records import AttentionForecast, PlanSummary, StageSummary
from batchllm_operators.spec_base import StorageOptions
from batchllm_operators.specs.planning import CostModel, PlanningSpec
from batchllm_operators.store import Store
from batchllm_operators.wording import counted

_LOGGER = logging.getLogger(__name__)


def plan_staged(
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
    *,
    log: Callable[[str], None] = _LOGGER.info,
) -> PlanSummary:
    """Group, order and pack the requests that remain; written to `plan/` of the work folder.

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
        log: takes one line on what came out.

    Raises:
        TerminalError: a staged part is missing or damaged.
        TransientError: the store does not answer.
    """
    summary = plan_requests(
        Store(work_uri, storage),
        stage,
        planning,
        engines=engines,
        calibrated=calibrated,
        default=default,
        earlier=earlier_runs(work_uri, storage),
        usd_per_engine_hour=usd_per_engine_hour,
        pilot=pilot,
        attention=attention,
    )
    possible = "" if summary.counts.done_requests else f", possible {summary.saving.optimum:.1%}"
    saving = f"saving {summary.saving_to_come:.1%} of their prompt tokens{possible}"
    log(
        f"planned {counted(summary.counts.requests, 'request')} in {counted(summary.shape.groups, 'group')} and "
        f"{counted(len(summary.bundles), 'bundle')}: {saving}"
    )
    return summary
