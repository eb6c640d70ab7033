"""Calibrations with which the gate decides by bytes alone."""

from __future__ import annotations

from batchllm_kernels.attention.cost import KernelCalibration


def free_launches(source: str, *, minimum_gain: float) -> KernelCalibration:
    """Of a device whose launches cost nothing and whose paths read at one rate, from memory."""
    return KernelCalibration(
        source=source,
        stock_bytes_per_second=1e12,
        l2_bytes_per_second=1e15,
        l2_bytes=0.0,
        processors=1,
        shared_bytes_per_second=1e12,
        shared_flops_per_second=1e15,
        own_bytes_per_second=1e12,
        captured_launch_seconds=0.0,
        uncaptured_launch_seconds=0.0,
        uncaptured_layer_seconds=0.0,
        minimum_gain=minimum_gain,
    )
