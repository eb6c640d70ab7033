"""Host time of one work plan, which every engine step pays once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from batchllm_kernels.attention.work_plan import WorkPlanShape, plan_work
from batchllm_kernels.bench.workloads import DecodeStep, SharingRequest, decode_step

REQUESTS = 1024
BLOCKS = 256
BLOCK_SIZE = 16
REPETITIONS = 100


@dataclass(frozen=True, slots=True)
class PlanTime:
    """Host time of a plan: median and minimum of many repetitions, milliseconds; items of both kinds."""

    step: str
    requests: int
    blocks_per_request: int
    items: int
    median_ms: float
    minimum_ms: float


def plan_times() -> Iterator[PlanTime]:
    """Times for steps of 1,024 decoding requests of 256 blocks that share in several ways."""
    shape = WorkPlanShape(block_size=BLOCK_SIZE, queries_per_kv_head=4)
    for step in _steps():
        seconds = []
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            plan = plan_work(step.block_table, step.seq_lens, shape)
            seconds.append(time.perf_counter() - start)
        items = len(plan.shared_items) + len(plan.own_items)
        yield PlanTime(step.name, REQUESTS, step.block_table.shape[1], items, 1e3 * median(seconds), 1e3 * min(seconds))


def _steps() -> Iterator[DecodeStep]:
    for name, prefixes in {
        "nothing shared": (),
        "one prefix of 200 blocks for all": ((1, 200),),
        "64 groups with 125 blocks": ((64, 125),),
        "64 groups with 100 blocks under one parent of 12": ((1, 12), (64, 100)),
        "512 groups with 100 blocks under one parent of 40": ((1, 40), (512, 100)),
    }.items():
        own = (BLOCKS - sum(blocks for _, blocks in prefixes)) * BLOCK_SIZE
        requests = [
            SharingRequest(tuple((f"prefix {n % groups}", blocks * BLOCK_SIZE) for groups, blocks in prefixes), own)
            for n in range(REQUESTS)
        ]
        yield decode_step(name, requests, BLOCK_SIZE)
