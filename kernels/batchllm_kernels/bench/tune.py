"""Search for launch parameters on a device, once, offline: each candidate is checked, then timed on several steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from math import exp, log
from statistics import mean
from typing import Any

import torch

from batchllm_kernels.attention.launch import launch_planned_attention
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.tuning import Tuning
from batchllm_kernels.attention.work_plan import PlanShape, plan_work
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import LayeredStep, layered_step
from batchllm_kernels.bench.measure import checked_errors
from batchllm_kernels.bench.results import Row
from batchllm_kernels.bench.setup import Setup
from batchllm_kernels.bench.timers import LayerCall

POINTS = (
    GridPoint(2000, 16, requests=512),
    GridPoint(2048, 128, own=64, heads=64, requests=512),
    GridPoint(256, 2, own=512, requests=256),
)


def candidates(setup: Setup, *, quick: bool = False) -> dict[str, Tuning]:
    """Launch parameters to try, by a name each, the likely ones first; `quick` tries few."""
    if quick or setup.rehearsal:
        made = [Tuning(16, 64, 32, 4, 5), Tuning(16, 64, 64, 4, 3)]
    else:
        made = [Tuning(16, *rest) for rest in product((64, 32, 128), (32, 64, 128), (4, 8), (5, 3, 2, 7))]
    return {" ".join(f"{name}={value}" for name, value in asdict(tuning).items()): tuning for tuning in made}


def measured(setup: Setup, tuning: Tuning) -> Row:
    """Microseconds of a layer on each point with these parameters.

    Raises:
        WrongResultError: when a result is wrong.
    """
    times = {}
    for point in setup.points(important=False) if setup.rehearsal else POINTS:
        inputs = layered_step(point, setup.device, setup.dtype, layers=setup.layers)
        calls = {"tuned": _call(inputs, tuning)}
        checked_errors(calls, inputs)
        times[point.key] = setup.timer(calls, inputs.layers)["tuned"]
    return {"parameters": asdict(tuning), "microseconds": times}


def best(rows: Sequence[Row]) -> dict[str, Any]:
    """The parameters with the least geometric mean of their times over the points, each relative to its best.

    Raises:
        ValueError: when there are none.
    """
    if not rows:
        raise ValueError("candidates: expected one that was measured, got none")
    least = {point: min(row["microseconds"][point] for row in rows) for point in rows[0]["microseconds"]}

    def relative(row: Row) -> float:
        return exp(mean(log(row["microseconds"][point] / least[point]) for point in least))

    parameters: dict[str, Any] = min(rows, key=relative)["parameters"]
    return parameters


def _call(inputs: LayeredStep, tuning: Tuning) -> LayerCall:
    point = inputs.point
    shape = PlanShape(
        block_size=point.block_size,
        queries_per_kv_head=point.heads // point.kv_heads,
        element_bytes=inputs.query.itemsize,
        narrow_tile_rows=tuning.narrow_tile_rows,
        wide_tile_rows=tuning.wide_tile_rows,
    )
    step = inputs.step
    plan = plan_work(step.block_table, step.seq_lens, step.query_start_loc, shape)
    buffers = PlanBuffers.of_plan(plan, point.heads, point.head_size, inputs.device)

    def call(layer: int) -> torch.Tensor:
        launch_planned_attention(
            inputs.query,
            *inputs.caches[layer],
            inputs.block_table,
            inputs.seq_lens,
            inputs.query_start_loc,
            inputs.scale,
            buffers,
            tuning,
            inputs.output,
        )
        return inputs.output

    return call
