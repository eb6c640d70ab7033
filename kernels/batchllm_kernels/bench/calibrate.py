"""Turns measured points of the grid into what the cost gate is fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batchllm_kernels.attention.cost import KernelCalibration
from batchllm_kernels.attention.step_traffic import step_work
from batchllm_kernels.attention.tuning import multiprocessors
from batchllm_kernels.attention.work_plan import plan_work
from batchllm_kernels.bench.fit import MeasuredStep, device_for_fit, fit_calibration
from batchllm_kernels.bench.host_time import WITH_LAUNCHES, WITHOUT_LAUNCHES
from batchllm_kernels.bench.layered_step import l2_bytes
from batchllm_kernels.bench.measure import MeasuredPoint
from batchllm_kernels.bench.ours import OWN_LAUNCH, SHARED, SHARED_LAUNCH, shape_of
from batchllm_kernels.bench.results import Row
from batchllm_kernels.bench.rivals import STOCK_NAMES

LAUNCHES_OF_A_LAYER = 2  # of the call whose host time is measured: shared and own


def calibrated(
    source: str, points: Sequence[MeasuredPoint], host: Sequence[Row], device: torch.device, dtype: torch.dtype
) -> KernelCalibration:
    """What the device reaches.

    Args:
        source: of the entry.
        points: measured ones.
        host: rows of `host_time.host_rows`.
        device, dtype: that they were measured on.

    Raises:
        ValueError: when the points are too few.
    """
    bare = device_for_fit(l2_bytes=l2_bytes(device), processors=multiprocessors(device))
    measured = [measured_step(point, bare, device, dtype) for point in points]
    return fit_calibration(source, measured, bare, uncaptured_launch_seconds=launch_seconds(host))


def measured_step(
    point: MeasuredPoint, bare: KernelCalibration, device: torch.device, dtype: torch.dtype
) -> MeasuredStep:
    """A point as the fit takes it: seconds of vLLM's own attention, where there was one, and of ours.

    Args:
        point: as measured.
        bare: the device, of which only its size is known.
        device, dtype: that it was measured on.
    """
    step = point.point.step()
    plan = plan_work(step.block_table, step.seq_lens, shape_of(point.point, device, dtype))
    seconds = {name: time / 1e6 for name, time in point.microseconds.items()}
    return MeasuredStep(
        work=step_work(plan, step.seq_lens, point.point.model, bare),
        stock=min((seconds[name] for name in STOCK_NAMES if name in seconds), default=None),
        shared=seconds.get(SHARED_LAUNCH),
        own=seconds.get(OWN_LAUNCH),
        whole=seconds[SHARED],
    )


def launch_seconds(host: Sequence[Row]) -> float:
    """Fixed cost of one launch by the host: what a call takes with its launches, over their number.

    A rehearsal has no launches: what our own Python takes stands for them.
    """
    times = {row["what"]: row["microseconds"] for row in host}
    return float(times.get(WITH_LAUNCHES, times[WITHOUT_LAUNCHES])) / 1e6 / LAUNCHES_OF_A_LAYER
