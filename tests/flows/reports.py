"""Plans, results and reports for the tests of the report: made of figures, with no engine."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from batchllm_flows.report import ExecutedPlan, JobReport, StepSeconds, build_report
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.records import BundleInfo, BundleResult, EngineLoad, Manifest, OutputLayout, PlanSummary
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.store import Store
from tests.plan.staged_jobs import stage_prompts

STARTED = datetime(2026, 11, 21, 8, 0, tzinfo=UTC)
TRACE_TYPES = {
    "time_s": pa.float64(), "step_seconds": pa.float32(), "prefill_tokens": pa.int32(), "decode_tokens": pa.int32(),
    "running": pa.int32(), "waiting": pa.int32(), "kv_tokens_used": pa.int64(), "kv_tokens_capacity": pa.int64(),
    "preempted": pa.int32(),
}  # fmt: skip


def plan_of_groups(folder: Path, *, groups: int = 4, members: int = 6, bundle_minutes: float = 0.002) -> PlanSummary:
    """A real plan of prompts in groups of 64 shared tokens, two groups below each shared beginning of 32."""
    chance = random.Random(0)
    prompts = [
        [group // 2] * 32 + [1000 + group] * 32 + [chance.randrange(10_000) for _ in range(20)]
        for group in range(groups)
        for _ in range(members)
    ]
    work = Store(str(folder))
    planning = PlanningSpec(bundle_minutes=bundle_minutes)
    return plan_requests(work, stage_prompts(work, prompts), planning, usd_per_engine_hour=3.0)


def a_plan(bundles: int = 2, **changes: Any) -> PlanSummary:
    """The figures of a plan; a bundle: 10 requests, 1,000 prompt tokens, 400 of these to compute, 50 to generate.

    A change of a part's figure is named as in `counts__rows`.
    """
    values: dict[str, Any] = {
        "bundles": tuple(
            BundleInfo(
                name=f"plan/bundle-{number:05d}.parquet",
                requests=10,
                groups=1,
                prompt_tokens=1000,
                expected_computed_prompt_tokens=400,
                expected_output_tokens=50,
                expected_seconds=2.0,
            )
            for number in range(bundles)
        ),
        "counts": {
            "rows": 10 * bundles,
            "requests": 10 * bundles,
            "duplicate_rows": 0,
            "done_requests": 0,
            "prompt_tokens": 1000 * bundles,
            "planned_prompt_tokens": 1000 * bundles,
        },
        "saving": {"planned": 0.6, "optimum": 0.65, "single_level": 0.5},
        "forecast": {
            "computed_prompt_tokens": 400 * bundles,
            "output_tokens": 50 * bundles,
            "seconds": 2.0 * bundles,
            "usd": 0.01 * bundles,
        },
        "shape": {"groups": bundles, "largest_groups": (), "block_size": 16},
        "seconds": 0.1,
    }
    for path, value in changes.items():
        part, _, field = path.partition("__")
        values[part] = {**values[part], field: value} if field else value
    return PlanSummary.model_validate(values)


def executed(plan: PlanSummary, *, computed: int = 500, output: int = 40, seconds: float = 3.0) -> ExecutedPlan:
    """The plan with the same result of each bundle, the last bundle first; the first engine took 4 s to load."""
    results = [
        BundleResult(
            bundle=bundle.name,
            requests=bundle.requests,
            errors=0,
            prompt_tokens=bundle.prompt_tokens,
            cached_tokens=bundle.prompt_tokens - computed,
            completion_tokens=output,
            parts=(),
            load_seconds=0.0 if number else 4.0,
            seconds=seconds,
        )
        for number, bundle in enumerate(plan.bundles)
    ]
    return ExecutedPlan(plan, tuple(reversed(results)))


def a_report(*runs: ExecutedPlan, prompt_tokens: int = 2000, computed: int = 1000, **changes: Any) -> JobReport:
    """The report of a run that executed these plans in 10 s."""
    manifest = Manifest(
        format_version=1,
        job_id="0123abcd",
        job_name=changes.pop("job_name", "reviews"),
        work_uri="/work-folder",
        rows=changes.pop("rows", 20),
        error_rows=changes.pop("error_rows", {}),
        files=(),
        layout=OutputLayout(format="parquet", rows_per_file=100_000),
        prompt_tokens=prompt_tokens,
        cached_tokens=prompt_tokens - computed,
        computed_prompt_tokens=computed,
        completion_tokens=80,
    )
    runs = runs or (executed(a_plan()),)
    load = EngineLoad(seconds=4.0, settings=tuple(changes.pop("engine_settings", ())))
    if runs[-1].results:
        first, *others = runs[-1].results
        runs = (*runs[:-1], ExecutedPlan(runs[-1].plan, (first.model_copy(update={"loads": (load,)}), *others)))
    settings = {
        "started": STARTED,
        "engines": 1,
        "output_uri": "/output",
        "work_uri": "/work-folder",
    } | changes
    return build_report(manifest, runs, StepSeconds(stage=1, plan=1, execute=10, merge=1, total=13), **settings)


def trace_table(time_s: list[float], **columns: list[int]) -> pa.Table:
    """Steps at these times, of 100 prompt tokens and 10 generated ones in a half full cache, unless said otherwise."""
    usual = {
        "step_seconds": 0.5, "prefill_tokens": 100, "decode_tokens": 10, "running": 10, "waiting": 5,
        "kv_tokens_used": 500, "kv_tokens_capacity": 1000, "preempted": 0,
    }  # fmt: skip
    values: dict[str, Any] = {"time_s": time_s} | {name: [value] * len(time_s) for name, value in usual.items()}
    return pa.table({name: pa.array((values | columns)[name], kind) for name, kind in TRACE_TYPES.items()})
