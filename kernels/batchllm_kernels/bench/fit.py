"""From measured points to the numbers that the cost gate and the tuning table hold."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import quantiles

from batchllm_kernels.attention.cost import Calibration
from batchllm_kernels.bench.measure import MeasuredPoint
from batchllm_kernels.bench.ours import SHARED

MINIMUM_GAIN = 0.05
LARGE_BYTES = 100e6  # above, a launch is a small part of the time


def fit_calibration(source: str, measured: Sequence[MeasuredPoint], matmul_flops_per_second: float) -> Calibration:
    """What a device reaches, on the safe side: a good quarter of the stock points, a bad quarter of the shared ones.

    Arithmetic is not measured on decode steps; FlashAttention reaches two thirds of a matrix product, kernels in Triton
    a quarter, so that steps with long prefill chunks stay on the stock path.

    Raises:
        ValueError: without at least two points of each kind that move 100 MB.
    """
    stock = [
        one.dense_bytes / one.microseconds[one.best_other] * 1e6
        for one in measured
        if one.best_other and one.dense_bytes > LARGE_BYTES
    ]
    shared = [one.minimum_bytes / one.microseconds[SHARED] * 1e6 for one in measured if one.minimum_bytes > LARGE_BYTES]
    if len(stock) < 2 or len(shared) < 2:
        raise ValueError(
            f"measured: expected at least 2 points of 100 MB on each path, got {len(stock)} and {len(shared)}"
        )
    shared_bytes_per_second = quantiles(shared, n=4)[0]
    small = min(measured, key=lambda one: one.minimum_bytes)
    overhead = small.microseconds[SHARED] / 1e6 - small.minimum_bytes / shared_bytes_per_second
    return Calibration(
        source=source,
        stock_bytes_per_second=quantiles(stock, n=4)[2],
        shared_bytes_per_second=shared_bytes_per_second,
        stock_flops_per_second=matmul_flops_per_second * 2 / 3,
        shared_flops_per_second=matmul_flops_per_second / 4,
        shared_overhead_seconds=max(overhead, 0.0),
        minimum_gain=MINIMUM_GAIN,
    )
