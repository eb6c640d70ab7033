"""The planner at scale: seconds, memory and savings on staged jobs of up to a million requests.

    python benchmarks/planner.py --json
    python benchmarks/planner.py --fields --json

Every run is a process of its own, so that its peak memory is its own; the job is generated and staged before, and not
counted. Seconds are the median of three runs. A run is refused when its plan does not hold every request exactly once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm_operators.columns.arrays import Int64s
from batchllm_operators.columns.request_keys import find_keys
from batchllm_operators.plan.block_size import planned_block_size
from batchllm_operators.plan.cache_simulator import number_blocks, simulate_cache
from batchllm_operators.plan.disk_array import DiskArray, TokenSpool
from batchllm_operators.plan.planning import plan_requests
from batchllm_operators.plan.prefix_order import sort_by_prefix, usable_blocks
from batchllm_operators.plan.requests import HashSpool, read_requests
from batchllm_operators.records import PlanSummary, StageSummary
from batchllm_operators.specs.planning import PlanningSpec
from batchllm_operators.stage.field_order import FieldEncoder, choose_field_order
from batchllm_operators.store import Store
from batchllm_operators.work.layout import PLAN_SUMMARY, STAGED_SUMMARY
from benchmarks.staged import stage
from benchmarks.tables import TABLES
from benchmarks.workloads import planner_mixture

sys.path.insert(0, str(Path(__file__).parent.parent))


SIZES = (100_000, 200_000, 500_000, 1_000_000)
CACHE_SHARE = 0.1
REPEATS = 3


def plan_run(folder: str) -> dict[str, Any]:
    """Plan a staged job; seconds and memory of this process."""
    work, staged = _staged(folder)
    started = time.monotonic()
    plan = plan_requests(work, staged, PlanningSpec())
    seconds = time.monotonic() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "requests": staged.rows,
        "tokens": staged.prompt_tokens,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_gb": round(usage.ru_maxrss / 1e6, 2),
        "single_level_saving": round(plan.saving.single_level, 6),
        "multi_level_saving": round(plan.saving.planned, 6),
        "optimum_saving": round(plan.saving.optimum, 6),
        "groups": plan.shape.groups,
        "bundles": len(plan.bundles),
    }


def examine(folder: str) -> dict[str, Any]:
    """Refuse a plan that does not hold every request exactly once; replay it, and the rows as given, through a cache.

    The cache holds `CACHE_SHARE` of the tokens that an ideal one computes.
    """
    work, staged = _staged(folder)
    planning = PlanningSpec()
    block = planned_block_size(planning)
    with TokenSpool() as tokens, DiskArray(np.uint64) as disk:
        requests = read_requests(
            work, staged, block_size=block, tokens=tokens, hashes=HashSpool(disk, memory_bytes=8 * 10**9)
        )
    plan = PlanSummary.model_validate_json(work.read_bytes(PLAN_SUMMARY))
    planned: list[bytes] = []
    for bundle in plan.bundles:
        with work.parquet(bundle.name) as file:
            planned += file.read(columns=["request_key"])["request_key"].to_pylist()
    keys = np.frombuffer(b"".join(planned), dtype=">u8").reshape(-1, 2).astype(np.uint64)
    place = find_keys(keys, requests.keys) if len(set(planned)) == len(planned) else np.array([-1])
    if len(place) != len(requests.keys) or (place < 0).any():
        raise SystemExit(f"wrong plan: {len(planned)} requests planned, expected {len(requests.keys)} distinct ones")

    order = sort_by_prefix(requests.hashes, requests.keys)
    lengths, blocks = requests.prompt_tokens[order.rows], requests.hashes.blocks[order.rows]
    usable = usable_blocks(lengths, block)
    numbers = number_blocks(order, blocks)
    optimum_tokens = int(lengths.sum(dtype=np.int64)) - block * int(
        np.minimum(order.shared_blocks, usable).sum(dtype=np.int64)
    )
    capacity = max(int(CACHE_SHARE * optimum_tokens) // block, 1)
    position = np.empty(len(order.rows), dtype=np.int64)
    position[order.rows] = np.arange(len(order.rows))

    def saving(rows: Int64s) -> float:
        found = simulate_cache(position[rows], numbers, usable, capacity_blocks=capacity)
        computed = int(lengths[position[rows]].sum(dtype=np.int64)) - block * int(found.sum(dtype=np.int64))
        return round(1 - computed / requests.row_tokens, 6)

    return {
        "cache_tokens": capacity * block,
        "simulated_planned_saving": saving(place),
        "simulated_stock_saving": saving(requests.request_of_row.astype(np.int64)),
    }


def field_runs() -> list[dict[str, Any]]:
    """Field reordering of tables like those of Liu et al."""
    runs = []
    for make in TABLES.values():
        table = make()
        columns = [pa.array(values) for values in table.columns.values()]
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            encoder = FieldEncoder(list(table.columns))
            encoder.add(columns)
            order = choose_field_order(encoder.table())
            seconds.append(time.monotonic() - started)
        if not (np.sort(order.fields, axis=1) == np.arange(len(columns))).all():
            raise SystemExit(f"wrong order: a row of {table.name} lost a field")
        runs.append(
            {
                "table": table.name,
                "rows": len(columns[0]),
                "fields": len(columns),
                "seconds": round(sorted(seconds)[1], 3),
                "first_seconds": round(seconds[0], 3),
                "hit_rate_as_given": round(order.hit_rate_unsorted, 4),
                "hit_rate_sorted_rows": round(order.hit_rate_as_given, 4),
                "hit_rate_reordered": round(order.hit_rate, 4),
                "times_as_given": _times(order.hit_rate, order.hit_rate_unsorted),
                "times_sorted_rows": _times(order.hit_rate, order.hit_rate_as_given),
            }
        )
    return runs


def _times(rate: float, baseline: float) -> float | None:
    """How many times the baseline; None where that is 0."""
    return round(rate / baseline, 2) if baseline else None


def planner_runs(sizes: list[int]) -> list[dict[str, Any]]:
    """Stage, plan, and examine a mixture of each size."""
    runs = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="batchllm-planner-") as folder:
            stage(Store(folder), planner_mixture(size))
            # What staging left to write to the disk is not the planner's to wait for.
            os.sync()
            repeats = sorted((_in_process("plan", folder) for _ in range(REPEATS)), key=lambda run: run["seconds"])
            median = repeats[len(repeats) // 2]
            peak = max(run["peak_rss_gb"] for run in repeats)
            runs.append(median | {"peak_rss_gb": peak} | _in_process("examine", folder))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fields", action="store_true", help="field reordering instead of planning")
    parser.add_argument("--requests", type=int, nargs="+", default=list(SIZES), metavar="N")
    parser.add_argument("--run", choices=["plan", "examine"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps({"plan": plan_run, "examine": examine}[options.run](options.folder)))
        return
    runs = field_runs() if options.fields else planner_runs(options.requests)
    if options.json:
        print(json.dumps({"runs": runs}, indent=2))
    else:
        for run in runs:
            print("  ".join(f"{name} {value}" for name, value in run.items()))


def _in_process(run: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", run, "--folder", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{run} failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _staged(folder: str) -> tuple[Store, StageSummary]:
    work = Store(folder)
    return work, StageSummary.model_validate_json(work.read_bytes(STAGED_SUMMARY))


if __name__ == "__main__":
    main()
