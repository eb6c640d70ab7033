"""What the kernels read and write for each workload shape, without a device: roofline and expected speed-up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from batchllm_kernels.attention.cost import (
    KernelCalibration,
    Launching,
    ModelHeads,
    StepSetting,
    StepWork,
    calibration_for,
    decide,
    shared_path_seconds,
    unshared_seconds,
)
from batchllm_kernels.attention.step_traffic import step_work
from batchllm_kernels.attention.work_plan import WorkPlan, WorkPlanShape, plan_work
from batchllm_kernels.bench.workloads import DecodeStep, decode_step, groups, workload_steps

PROGRAMS_PER_PROCESSOR = 4  # of a persistent grid

MODEL = ModelHeads(heads=32, kv_heads=8, head_size=128)
LAYERS = 32


@dataclass(frozen=True, slots=True)
class Device:
    """Peak figures of a device as its maker states them."""

    name: str
    bytes_per_second: float
    flops_per_second: float


H100 = Device("NVIDIA H100 80GB HBM3", 3.35e12, 9.89e14)

EXPECTED = KernelCalibration(
    source="inferred for an H100: what its stock attention is known to reach, and what our kernels are to reach",
    stock_bytes_per_second=2.6e12,
    l2_bytes_per_second=5.5e12,
    l2_bytes=50e6,
    processors=132,
    shared_bytes_per_second=2.4e12,
    shared_flops_per_second=2.0e14,
    own_bytes_per_second=2.4e12,
    captured_launch_seconds=1.5e-6,
    uncaptured_launch_seconds=5.0e-6,
    uncaptured_layer_seconds=8.0e-5,
    minimum_gain=0.05,
)
"""Not what the cost gate uses: it is more careful, see `calibration.json`."""

ISSUE_SHAPES = ((256, 16), (2_000, 16), (2_000, 64), (4_096, 64), (16_000, 64))
"""Prefix tokens and degree of the shapes that published figures are compared at: one group, 200 tokens of own."""


@dataclass(frozen=True, slots=True)
class ModelledStep:
    """Traffic of one layer of one decode step.

    Attributes:
        workload: name of the shape.
        requests: that decode.
        items: shared and own work items of one KV head.
        minimum_mb: unique keys and values, queries and outputs, in 10^6 bytes: no kernel can move less.
        read_mb, moved_mb: read, and read or written, on the shared path; keys read by two tiles count twice.
        stock_moved_mb: read or written where every request reads its own context.
        stock_memory_mb: what of it comes from memory, when members of a group find a prefix in the second-level cache.
        read_to_minimum: bytes read over the least that must be read.
        stock_from_memory_us, stock_with_l2_us, shared_us: expected time of a captured layer.
        speedup_from_memory, speedup_with_l2: the first two over the third.
        roofline_us: the shared path at the device's peak.
        bound: "memory" or "compute", whichever the roofline is.
        gate: what the cost gate decides in a captured step with the calibration of the device, and why.
    """

    workload: str
    requests: int
    items: int
    minimum_mb: float
    read_mb: float
    moved_mb: float
    stock_moved_mb: float
    stock_memory_mb: float
    read_to_minimum: float
    stock_from_memory_us: float
    stock_with_l2_us: float
    shared_us: float
    speedup_from_memory: float
    speedup_with_l2: float
    roofline_us: float
    bound: str
    gate: str


def model_report(block_size: int) -> dict[str, Any]:
    """Every workload shape, and the shapes of published figures.

    Args:
        block_size: tokens of a KV block.
    """
    steps = [*workload_steps(block_size), *issue_steps(block_size)]
    return {
        "kind": "byte-count model of one layer of one captured decode step, nothing measured",
        "heads": asdict(MODEL),
        "block_size": block_size,
        "device": asdict(H100),
        "rates of the speed-ups": asdict(EXPECTED),
        "rates of the gate": asdict(calibration_for(H100.name)),
        "rows": [asdict(model_step(step, MODEL)) for step in steps],
    }


def issue_steps(block_size: int) -> Iterator[DecodeStep]:
    """One group of each shape of `ISSUE_SHAPES`."""
    for prefix, degree in ISSUE_SHAPES:
        name = f"one group ({prefix} + 200, degree {degree})"
        yield decode_step(name, groups(1, prefix=prefix, own=200, degree=degree), block_size)


def model_step(step: DecodeStep, heads: ModelHeads, device: Device = H100) -> ModelledStep:
    """The byte count of one step, from the very plan that the kernels would run."""
    plan, work = planned_work(step, heads, EXPECTED)
    launches = [work.own, *(one for one in (work.shared, work.merge) if one is not None)]
    moved = sum(one.total_bytes for one in launches)
    from_memory = sum(one.first_bytes for one in launches)
    flops = sum(one.flops for one in launches)
    requests = len(step.seq_lens)
    queries = requests * heads.query_token_bytes
    written = queries + plan.partials * heads.partial_bytes
    least_read = step.unique_kv_tokens * heads.kv_token_bytes + queries
    memory_seconds = from_memory / device.bytes_per_second
    compute_seconds = flops / device.flops_per_second
    stock = EXPECTED.captured_launch_seconds + EXPECTED.stock_seconds(work.stock)
    stock_from_memory = EXPECTED.captured_launch_seconds + EXPECTED.stock_seconds(work.stock.without_l2)
    ours = expected_seconds(work)
    decision = decide(work, StepSetting(LAYERS, Launching.CAPTURED), calibration_for(device.name))
    return ModelledStep(
        workload=step.name,
        requests=requests,
        items=len(plan.shared_items) + len(plan.own_items),
        minimum_mb=(least_read + queries) / 1e6,
        read_mb=(moved - written) / 1e6,
        moved_mb=moved / 1e6,
        stock_moved_mb=work.stock.total_bytes / 1e6,
        stock_memory_mb=work.stock.first_bytes / 1e6,
        read_to_minimum=(moved - written) / least_read,
        stock_from_memory_us=1e6 * stock_from_memory,
        stock_with_l2_us=1e6 * stock,
        shared_us=1e6 * ours,
        speedup_from_memory=stock_from_memory / ours,
        speedup_with_l2=stock / ours,
        roofline_us=1e6 * max(memory_seconds, compute_seconds),
        bound="memory" if memory_seconds >= compute_seconds else "compute",
        gate=f"{'share' if decision.share else 'stock'}: {decision.reason}",
    )


def planned_work(step: DecodeStep, heads: ModelHeads, device: KernelCalibration) -> tuple[WorkPlan, StepWork]:
    """The plan of a step in bf16, and what it moves."""
    shape = WorkPlanShape(
        block_size=step.block_size,
        queries_per_kv_head=heads.heads // heads.kv_heads,
        element_bytes=heads.element_bytes,
        target_items=max(1, PROGRAMS_PER_PROCESSOR * device.processors // heads.kv_heads),
    )
    plan = plan_work(step.block_table, step.seq_lens, shape)
    return plan, step_work(plan, step.seq_lens, heads, device)


def expected_seconds(work: StepWork) -> float:
    """The seconds of a captured layer of ours at the inferred rates, sharing where there is something to share."""
    if work.shared is None:
        return unshared_seconds(work, Launching.CAPTURED, EXPECTED)
    return shared_path_seconds(work, Launching.CAPTURED, EXPECTED)
