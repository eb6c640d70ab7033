"""The plan step: reads what is staged and done, writes bundles and the plan's summary."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from batchllm_operators.cost import Calibration, default_cost_model, rates_source
from batchllm_operators.disk_space import full_disk_told
from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.plan.columnar_plan import GIGABYTE, make_plan
from batchllm_operators.plan.disk_array import DiskArray, TokenSpool
from batchllm_operators.plan.plan_summary import summarise
from batchllm_operators.plan.requests import HashSpool, read_requests, read_results
from batchllm_operators.plan.writing import write_bundles
from batchllm_operators.records import PlanSummary, StageSummary
from batchllm_operators.specs.planning import CostModel, PlanningSpec
from batchllm_operators.store import Store
from batchllm_operators.work.bundles import delete_plan, write_summary


def plan_requests(
    work: Store,
    stage: StageSummary,
    planning: PlanningSpec,
    *,
    workers: int = 1,
    calibrated: Calibration | None = None,
    default: CostModel | None = None,
    earlier: Sequence[Store] = (),
    usd_per_worker_hour: float | None = None,
    pilot: bool = False,
) -> PlanSummary:
    """Plan what remains of a job: staged requests without those that readable results answer.

    Writes `plan/bundle-*.parquet`, then `plan/summary.json`; an earlier plan is deleted first. The bundles depend on
    the staged requests, the results, the spec and the rates only: same input, same bytes.

    Args:
        work: the work folder.
        stage: what staging found.
        planning: the planning part of the job.
        workers: engines that will take bundles.
        calibrated: measured rates of one engine; `planning.cost` goes before them.
        default: the rates where there are neither; default: the hardware's, for a model of which nothing is known.
        earlier: work folders of earlier runs of the job, to learn output lengths from.
        usd_per_worker_hour: price of one engine, for the forecast.
        pilot: plan a sample of `planning.pilot_fraction` only, unless output lengths are known already. The summary
            says whether it is one; plan again once its bundles are computed.

    Raises:
        TerminalError: a staged part is missing or damaged.
        TransientError: the store does not answer.
    """
    started = time.monotonic()
    cost = planning.cost or (calibrated.rates if calibrated else default or default_cost_model())
    with full_disk_told("plan"), TokenSpool() as tokens, DiskArray(np.uint64) as disk:
        hashes = HashSpool(disk, int(planning.memory_gb * GIGABYTE / 2))
        requests = read_requests(work, stage, block_size=planned_block_size(planning), tokens=tokens, hashes=hashes)
        done, known = read_results([work]), read_results(earlier, only_looks=True)
        plan = make_plan(requests, done, known, planning, cost, workers=workers, pilot=pilot)
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
        workers=workers,
        usd_per_worker_hour=usd_per_worker_hour,
    )
    summary = summary.model_copy(update={"seconds": round(time.monotonic() - started, 3)})
    write_summary(work, summary)
    return summary
