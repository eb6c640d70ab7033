"""Our attention on a step of the benchmark: whole, without sharing, and each of its launches alone."""

from __future__ import annotations

import torch

from batchllm_kernels.attention.api import plan_shape, prefix_shared_attention
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.work_plan import PlanShape, WorkPlan, plan_work
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import LayeredStep
from batchllm_kernels.bench.timers import LayerCall

SHARED, UNSHARED = "prefix-shared", "prefix-shared kernels without sharing"


def shape_of(point: GridPoint, device: torch.device, dtype: torch.dtype) -> PlanShape:
    """What plans for a point must look like on a device."""
    return plan_shape(
        block_size=point.block_size,
        heads=point.heads,
        kv_heads=point.kv_heads,
        head_size=point.head_size,
        dtype=dtype,
        device=device,
    )


def plan_of(inputs: LayeredStep, *, share: bool) -> WorkPlan:
    """The plan of a step."""
    shape = shape_of(inputs.point, inputs.device, inputs.query.dtype)
    step = inputs.step
    return plan_work(step.block_table, step.seq_lens, step.query_start_loc, shape, share=share)


def our_call(inputs: LayeredStep, plan: WorkPlan) -> LayerCall:
    """Attention of one layer as the engine runs it."""
    _, heads, head_size = inputs.query.shape
    buffers = PlanBuffers.of_plan(plan, heads, head_size, inputs.device)
    buffers.partials.fill_(torch.nan)  # nothing may be read that was not written
    buffers.lses.fill_(torch.nan)

    def call(layer: int) -> torch.Tensor:
        return prefix_shared_attention(
            inputs.query,
            *inputs.caches[layer],
            inputs.block_table,
            inputs.seq_lens,
            inputs.query_start_loc,
            scale=inputs.scale,
            plan=buffers,
            impl="triton",
            output=inputs.output,
        )

    return call
