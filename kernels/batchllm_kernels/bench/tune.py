"""Search for launch parameters on a device, once, offline."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from batchllm_kernels.attention.launch import launch_planned_attention
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.reference import paged_attention
from batchllm_kernels.attention.tuning import Tuning
from batchllm_kernels.attention.work_plan import PlanShape, plan_work
from batchllm_kernels.bench.measure import MAX_ERROR, GridPoint, Timer, WrongResultError, point_inputs

POINTS = (GridPoint(2000, 16, 200, 32, 8), GridPoint(2048, 128, 64, 64, 8), GridPoint(256, 2, 512, 32, 8))


def candidates(*, quick: bool = False) -> Iterator[Tuning]:
    """Launch parameters to try; `quick` tries two."""
    if quick:
        yield Tuning(16, 64, 32, 4, 5)
        yield Tuning(16, 64, 64, 4, 3)
        return
    for wide, kv_tile, warps, stages in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 5, 7)):
        yield Tuning(16, wide, kv_tile, warps, stages)


def best_tuning(
    head_size: int, dtype: torch.dtype, device: torch.device, timer: Timer, *, quick: bool = False
) -> tuple[Tuning, float]:
    """The parameters with the least time over all points, and that time in microseconds.

    Candidates that do not fit the device or are wrong are left out.

    Raises:
        RuntimeError: when none works.
    """
    from triton.runtime.errors import OutOfResources

    best: tuple[Tuning, float] | None = None
    for tuning in candidates(quick=quick):
        try:
            time = sum(_time(point, tuning, head_size, dtype, device, timer) for point in POINTS)
        except (OutOfResources, WrongResultError):
            continue
        if best is None or time < best[1]:
            best = (tuning, time)
    if best is None:
        raise RuntimeError(f"head_size {head_size}, {dtype}: expected launch parameters that work, got none")
    return best


def _time(
    point: GridPoint, tuning: Tuning, head_size: int, dtype: torch.dtype, device: torch.device, timer: Timer
) -> float:
    """Microseconds of one point.

    Raises:
        WrongResultError: when the result is off by more than `MAX_ERROR`.
    """
    point = GridPoint(point.prefix, point.degree, point.own, point.heads, point.kv_heads, head_size)
    step = point.step()
    inputs = point_inputs(step, point, device, dtype)
    shape = PlanShape(
        block_size=point.block_size,
        queries_per_kv_head=point.heads // point.kv_heads,
        element_bytes=dtype.itemsize,
        narrow_tile_rows=tuning.narrow_tile_rows,
        wide_tile_rows=tuning.wide_tile_rows,
    )
    plan = plan_work(step.block_table, step.seq_lens, step.query_start_loc, shape)
    buffers = PlanBuffers.of_plan(plan, point.heads, point.head_size, device)
    output = torch.empty_like(inputs[0])
    scale = head_size**-0.5

    def call() -> torch.Tensor:
        launch_planned_attention(*inputs, scale, buffers, tuning, output)
        return output

    some = slice(0, 8)
    query, keys, values, table, lengths, starts = inputs
    expected = paged_attention(query[some], keys, values, table[some], lengths[some], starts[:9], scale)
    error = float((call()[some].float() - expected).abs().max() / expected.abs().max())
    if not error <= MAX_ERROR:
        raise WrongResultError(f"{tuning}: expected a relative error of at most {MAX_ERROR}, got {error:.3g}")
    return timer(call)
