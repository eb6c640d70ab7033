"""The plan step: reads what is staged and done, writes bundles and the plan's summary."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from batchllm_operators.cost import Calibration, default_cost_model, rates_source
from batchllm_operators.disk_space import full_disk_told
from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.plan.columnar_plan import GIGABYTE, Plan, make_plan
from batchllm_operators.plan.disk_array import DiskArray, TokenSpool
from batchllm_operators.plan.plan_summary import summarise
from batchllm_operators.plan.requests import HashSpool, RequestColumns, read_requests, read_results
from batchllm_operators.plan.shared_attention import EngineAttention, PlannedGroups, attention_forecast
from batchllm_operators.plan.writing import write_bundles
from batchllm_operators.records import AttentionForecast, PlanSummary, StageSummary
from batchllm_operators.specs.planning import CostModel, PlanningSpec
from batchllm_operators.store import Store
from batchllm_operators.tasks import task_named
from batchllm_operators.work.bundles import delete_plan, write_summary
from batchllm_operators.work.reuse import read_reuse


def plan_requests(
    work: Store,
    stage: StageSummary,
    planning: PlanningSpec,
    *,
    engines: int = 1,
    calibrated: Calibration | None = None,
    default: CostModel | None = None,
    earlier: Sequence[Store] = (),
    usd_per_engine_hour: float | None = None,
    pilot: bool = False,
    attention: EngineAttention | AttentionForecast | None = None,
) -> PlanSummary:
    """Plan what remains of a job: staged requests without those that readable results answer.

    Writes `plan/bundle-*.parquet`, then `plan/summary.json`; an earlier plan is deleted first. The bundles depend on
    the staged requests, the results, the spec and the rates only: same input, same bytes.

    Args:
        work: the work folder.
        stage: what staging found.
        planning: the planning part of the job.
        engines: the number of engines that will take bundles.
        calibrated: measured rates of one engine; `planning.cost` goes before them.
        default: the rates where there are neither; default: the hardware's, for a model of which nothing is known.
        earlier: work folders of earlier runs of the job, to learn output lengths from.
        usd_per_engine_hour: price of one engine, for the forecast.
        pilot: plan a sample of `planning.pilot_fraction` only, unless output lengths are known already. The summary
            says whether it is one; plan again once its bundles are computed.
        attention: of the engines, for a forecast of what prefix-shared attention saves; or that forecast, where an
            earlier plan of the run has made it; None: nothing is told of it.

    Raises:
        TerminalError: a staged part is missing or damaged.
        TransientError: the store does not answer.
    """
    started = time.monotonic()
    cost = planning.cost or (calibrated.rates if calibrated else default or default_cost_model())
    with full_disk_told("plan"), TokenSpool() as tokens, DiskArray(np.uint64) as disk:
        hashes = HashSpool(disk, int(planning.memory_gb * GIGABYTE / 2))
        requests = read_requests(work, stage, block_size=planned_block_size(planning), tokens=tokens, hashes=hashes)
        task = task_named(stage.task)
        done, known = read_results([work], task), read_results(earlier, task, only_looks=True)
        plan = make_plan(requests, done, known, planning, cost, engines=engines, pilot=pilot)
        delete_plan(work)
        digests = write_bundles(work, plan, requests, tokens)
    summary = summarise(
        plan,
        requests,
        stage,
        planning,
        cost,
        digests=digests,
        rates=rates_source(planning.cost, calibrated),
        engines=engines,
        usd_per_engine_hour=usd_per_engine_hour,
        answered_before=read_reuse(work).answered,
    )
    forecast = _attention(attention, plan, requests, planning, cost)
    summary = summary.model_copy(update={"attention": forecast, "seconds": round(time.monotonic() - started, 3)})
    write_summary(work, summary)
    return summary


def _attention(
    known: EngineAttention | AttentionForecast | None,
    plan: Plan,
    requests: RequestColumns,
    planning: PlanningSpec,
    cost: CostModel,
) -> AttentionForecast | None:
    if known is None or isinstance(known, AttentionForecast):
        return known
    if plan.pilot or planning.order == "input" or not len(plan.request):
        return None  # a sample shares less than the job, and in the order of the rows members do not run together
    groups = PlannedGroups.of_requests(
        plan.group, plan.prefix_tokens, requests.prompt_tokens[plan.request], plan.output_tokens
    )
    seconds = float(plan.prefill_seconds.sum() + plan.decode_seconds.sum())
    return attention_forecast(groups, known, cost, engine_seconds=seconds)
