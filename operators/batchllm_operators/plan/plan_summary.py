"""Sums a plan up in figures: the summary that Prefect carries and a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.cost import engine_seconds, usd_of
from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.plan.columnar_plan import Plan, Sharing
from batchllm_operators.plan.output_lengths import EstimateSource
from batchllm_operators.plan.requests import RequestColumns
from batchllm_operators.records import (
    AnsweredBefore,
    BundleInfo,
    GroupInfo,
    PlanCounts,
    PlanForecast,
    PlanSaving,
    PlanShape,
    PlanSummary,
    SharedPrefix,
    SharingDegree,
    StageSummary,
)
from batchllm_operators.specs.planning import CostModel, PlanningSpec
from batchllm_operators.work.bundles import bundle_name

LARGEST_GROUPS = 10
LARGEST_PREFIXES = 40

Number = TypeVar("Number", np.int64, np.float64)


def summarise(
    plan: Plan,
    requests: RequestColumns,
    stage: StageSummary,
    planning: PlanningSpec,
    cost: CostModel,
    *,
    digests: Sequence[str],
    rates: str,
    engines: int,
    usd_per_engine_hour: float | None = None,
    answered_before: AnsweredBefore | None = None,
) -> PlanSummary:
    """Sum up a plan; the caller fills in `seconds`.

    Args:
        plan: the plan.
        requests: all distinct requests of the job.
        stage: what staging found.
        planning: the planning part of the job.
        cost: rates of one engine, as used for the plan.
        digests: of the bundles.
        rates: where `cost` comes from.
        engines: the number of engines that will take bundles.
        usd_per_engine_hour: price of one engine; None where it is not known.
        answered_before: what was taken from earlier runs; None: nothing.
    """
    answered_before = answered_before or AnsweredBefore()
    block = planned_block_size(planning)
    return PlanSummary(
        bundles=_bundle_infos(plan, requests, digests),
        pilot=plan.pilot,
        counts=PlanCounts(
            rows=stage.rows,
            error_rows=stage.error_rows,
            error_examples=stage.error_examples,
            requests=len(plan.request),
            duplicate_rows=len(requests.request_of_row) - len(requests.keys),
            done_requests=plan.done_requests,
            answered_before=answered_before,
            prompt_tokens=requests.row_tokens,
            planned_prompt_tokens=int(requests.prompt_tokens[plan.request].sum(dtype=np.int64)),
        ),
        saving=_saving(plan, requests, block),
        forecast=_forecast(plan, cost, rates, engines, usd_per_engine_hour, answered_before),
        shape=PlanShape(
            groups=int(plan.group.max(initial=-1)) + 1,
            largest_groups=_largest_groups(plan),
            sharing_degrees=_sharing_degrees(plan),
            shared_prefixes=_shared_prefixes(plan.planned, block),
            order=planning.order,
            block_size=block,
            parted_trees=plan.parted_trees,
            workers=engines,
            split_prefix_tokens=(
                0 if planning.order == "input" else int(plan.computed_tokens.sum()) - plan.planned.optimum_tokens
            ),
            field_sharing=stage.field_sharing,
        ),
        stage_seconds=stage.seconds,
        seconds=0.0,
    )


def _saving(plan: Plan, requests: RequestColumns, block_size: int) -> PlanSaving:
    def saving(computed_tokens: int) -> float:
        return 1 - computed_tokens / requests.row_tokens if requests.row_tokens else 0.0

    distinct_tokens = int(requests.prompt_tokens.sum(dtype=np.int64))
    optimum = saving(plan.whole.optimum_tokens)
    return PlanSaving(
        planned=optimum if plan.pilot else saving(int(plan.computed_tokens.sum()) + plan.done_computed_tokens),
        optimum=optimum,
        single_level=saving(distinct_tokens - plan.whole.first_level.saved_blocks * block_size),
        stock=None if plan.stock_computed_tokens is None else saving(plan.stock_computed_tokens),
    )


def _forecast(
    plan: Plan,
    cost: CostModel,
    rates: str,
    engines: int,
    usd_per_engine_hour: float | None,
    answered_before: AnsweredBefore,
) -> PlanForecast:
    load = np.zeros(max(engines, 1))
    np.add.at(load, plan.engine, _per_bundle(plan.prefill_seconds + plan.decode_seconds, plan.offsets))
    finished = float(load.max())
    of_source = np.bincount(plan.estimate_source, minlength=len(EstimateSource))
    avoided = engine_seconds(
        cost,
        requests=answered_before.requests,
        prompt_tokens=answered_before.prompt_tokens,
        computed_tokens=answered_before.prompt_tokens - answered_before.cached_tokens,
        output_tokens=answered_before.completion_tokens,
    )
    return PlanForecast(
        avoided_seconds=round(avoided, 3),
        avoided_usd=None if usd_per_engine_hour is None else usd_of(avoided, usd_per_engine_hour),
        computed_prompt_tokens=int(plan.computed_tokens.sum()),
        output_tokens=int(plan.output_tokens.sum(dtype=np.int64)),
        estimate_sources={
            source.name.lower(): int(count) for source, count in zip(EstimateSource, of_source, strict=True) if count
        },
        cache_tokens=cost.kv_capacity_tokens,
        rates=rates,
        prefill_seconds=round(float(plan.prefill_seconds.sum()), 3),
        decode_seconds=round(float(plan.decode_seconds.sum()), 3),
        seconds=round(finished, 3),
        usd=None if usd_per_engine_hour is None else usd_of(engines * finished, usd_per_engine_hour),
    )


def _per_bundle(values: npt.NDArray[Number], offsets: Int64s) -> npt.NDArray[Number]:
    if len(offsets) < 2:
        return values[:0]
    sums: npt.NDArray[Number] = np.add.reduceat(values, offsets[:-1])
    return sums


def _bundle_infos(plan: Plan, requests: RequestColumns, digests: Sequence[str]) -> tuple[BundleInfo, ...]:
    prompt = _per_bundle(requests.prompt_tokens[plan.request].astype(np.int64), plan.offsets)
    computed = _per_bundle(plan.computed_tokens, plan.offsets)
    output = _per_bundle(plan.output_tokens.astype(np.int64), plan.offsets)
    seconds = _per_bundle(plan.prefill_seconds + plan.decode_seconds, plan.offsets)
    return tuple(
        BundleInfo(
            name=bundle_name(number),
            worker=int(plan.engine[number]),
            requests=int(plan.offsets[number + 1] - plan.offsets[number]),
            groups=len(np.unique(plan.group[plan.offsets[number] : plan.offsets[number + 1]])),
            prompt_tokens=int(prompt[number]),
            expected_computed_prompt_tokens=int(computed[number]),
            expected_output_tokens=int(output[number]),
            expected_seconds=round(float(seconds[number]), 3),
            digest=digest,
        )
        for number, digest in enumerate(digests)
    )


def _largest_groups(plan: Plan) -> tuple[GroupInfo, ...]:
    size, prefix, saved = _groups(plan)
    best = np.argsort(-saved, kind="stable")[:LARGEST_GROUPS]
    output = np.bincount(plan.group, weights=plan.output_tokens)
    seconds = np.bincount(plan.group, weights=plan.prefill_seconds + plan.decode_seconds)
    return tuple(
        GroupInfo(
            requests=int(size[group]),
            prefix_tokens=int(prefix[group]),
            saved_tokens=int(saved[group]),
            expected_output_tokens=int(output[group]),
            expected_seconds=round(float(seconds[group]), 3),
        )
        for group in best
        if saved[group] > 0
    )


def _sharing_degrees(plan: Plan) -> tuple[SharingDegree, ...]:
    """Groups by size: up to 1, 2, 4, 8... requests."""
    size, _, saved = _groups(plan)
    if len(size) == 0:
        return ()
    step = np.ceil(np.log2(size)).astype(np.int64)
    return tuple(
        SharingDegree(
            up_to=2 ** int(one),
            groups=int((step == one).sum()),
            requests=int(size[step == one].sum()),
            saved_tokens=int(saved[step == one].sum()),
        )
        for one in np.unique(step)
    )


def _groups(plan: Plan) -> tuple[Int64s, Int64s, Int64s]:
    """Requests, prefix tokens and saved tokens of each group."""
    size = np.bincount(plan.group)
    prefix = np.zeros(len(size), dtype=np.int64)
    prefix[plan.group] = plan.prefix_tokens
    return size, prefix, (size - 1) * prefix


def _shared_prefixes(sharing: Sharing, block_size: int) -> tuple[SharedPrefix, ...]:
    """The nodes of the forest that save most by their own blocks, with all nodes above them, in pre-order."""
    forest = sharing.forest
    above = np.append(forest.depth, 0)[forest.parent]
    saved = (forest.leaves - 1).astype(np.int64) * (forest.depth - above) * block_size
    shown: set[int] = set()
    for node in np.argsort(-saved, kind="stable"):
        path = []
        place = int(node)
        while place >= 0 and place not in shown:
            path.append(place)
            place = int(forest.parent[place])
        if len(shown) + len(path) > LARGEST_PREFIXES:
            break
        shown.update(path)
    listed = sorted(shown)
    place_of = {node: place for place, node in enumerate(listed)}
    return tuple(
        SharedPrefix(
            parent=place_of.get(int(forest.parent[node]), -1),
            prefix_tokens=int(forest.depth[node]) * block_size,
            requests=int(forest.leaves[node]),
            saved_tokens=int(saved[node]),
        )
        for node in listed
    )
