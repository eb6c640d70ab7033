"""What the kernels read and write for each workload shape, without a device: roofline and expected speed-up."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchllm_kernels.attention.api import plan_shape
from batchllm_kernels.attention.cost import ModelHeads, calibration_for, decide, planned_cost, stock_cost
from batchllm_kernels.attention.work_plan import plan_work
from batchllm_kernels.bench.workloads import DecodeStep


@dataclass(frozen=True, slots=True)
class Device:
    """Peak figures of a device as its maker states them."""

    name: str
    bytes_per_second: float
    flops_per_second: float


H100 = Device("H100 SXM", 3.35e12, 9.89e14)


@dataclass(frozen=True, slots=True)
class ModelledStep:
    """Traffic of one layer of one decode step.

    Attributes:
        workload: name of the shape.
        requests: that decode.
        items: work items of one KV head.
        minimum_mb: unique keys and values, queries and outputs, in 10^6 bytes: no kernel can move less.
        read_mb, moved_mb: read, and read or written, on the shared path.
        stock_moved_mb: read or written where every request reads its own context.
        read_to_minimum: bytes read over the least that must be read.
        expected_speedup: stock traffic over shared traffic: what a memory-bound kernel of equal efficiency gains.
        roofline_us: the shared path at the device's peak.
        bound: "memory" or "compute", whichever the roofline is.
        gate: what the cost gate decides with the calibration of the device, and why.
    """

    workload: str
    requests: int
    items: int
    minimum_mb: float
    read_mb: float
    moved_mb: float
    stock_moved_mb: float
    read_to_minimum: float
    expected_speedup: float
    roofline_us: float
    bound: str
    gate: str


def model_step(step: DecodeStep, heads: ModelHeads, device: Device = H100) -> ModelledStep:
    """The byte count of one step, from the very plan that the kernels would run."""
    shape = plan_shape(
        block_size=step.block_size,
        heads=heads.heads,
        kv_heads=heads.kv_heads,
        head_size=heads.head_size,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    plan = plan_work(step.block_table, step.seq_lens, step.query_start_loc, shape)
    shared = planned_cost(plan, step.seq_lens, step.query_start_loc, heads)
    stock = stock_cost(step.seq_lens, step.query_start_loc, shape, heads)
    least_read = step.unique_kv_tokens * heads.kv_token_bytes + plan.query_tokens * heads.query_token_bytes
    memory_seconds = shared.bytes_moved / device.bytes_per_second
    compute_seconds = shared.flops / device.flops_per_second
    decision = decide(plan, shared, stock, calibration_for(device.name))
    return ModelledStep(
        workload=step.name,
        requests=len(step.seq_lens),
        items=len(plan.items),
        minimum_mb=(least_read + shared.output_bytes) / 1e6,
        read_mb=shared.bytes_read / 1e6,
        moved_mb=shared.bytes_moved / 1e6,
        stock_moved_mb=stock.bytes_moved / 1e6,
        read_to_minimum=shared.bytes_read / least_read,
        expected_speedup=stock.bytes_moved / shared.bytes_moved,
        roofline_us=1e6 * max(memory_seconds, compute_seconds),
        bound="memory" if memory_seconds >= compute_seconds else "compute",
        gate=f"{'share' if decision.share else 'stock'}: {decision.reason}",
    )
