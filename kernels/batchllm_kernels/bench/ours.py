"""Our attention on a step of the benchmark: as a captured step of an engine has it, and each of its launches alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from batchllm_kernels.attention import launch, triton_kernels
from batchllm_kernels.attention.api import plan_shape, prefix_shared_attention
from batchllm_kernels.attention.flash_kernels import gather_queries_kernel
from batchllm_kernels.attention.flash_shared import FlashSettings, SequenceBounds, VarlenAttention
from batchllm_kernels.attention.plan_buffers import PlanBuffers, PlanCapacity
from batchllm_kernels.attention.tuning import Tuning, device_architecture, multiprocessors, tuning_for
from batchllm_kernels.attention.work_plan import DIRECT, OwnItem, WorkPlan, WorkPlanShape, plan_work
from batchllm_kernels.bench.grid import GridPoint
from batchllm_kernels.bench.layered_step import LayeredStep
from batchllm_kernels.bench.timers import LayerCall

SHARED, UNSHARED = "prefix-shared", "prefix-shared kernels without sharing"
SHARED_LAUNCH, OWN_LAUNCH, MERGE_LAUNCH = "shared launch alone", "own launch alone", "merge launch alone"
IDLE = "launches without work"
FLASH_SHARED = "prefix-shared, FlashAttention 3 for shared parts"
FLASH_OF_PLAN = f"{FLASH_SHARED}, launched for this plan alone"
FLASH_LAUNCH, FLASH_IDLE = "FlashAttention 3 of shared parts alone", "launches without work, with FlashAttention 3"
OURS = (
    SHARED,
    UNSHARED,
    SHARED_LAUNCH,
    OWN_LAUNCH,
    MERGE_LAUNCH,
    IDLE,
    FLASH_SHARED,
    FLASH_OF_PLAN,
    FLASH_LAUNCH,
    FLASH_IDLE,
)
PARTIAL_BYTES = 4  # partial results and their log-sum-exp are fp32
KERNELS = {
    SHARED_LAUNCH: triton_kernels.attend_shared_kernel,
    OWN_LAUNCH: triton_kernels.attend_own_kernel,
    MERGE_LAUNCH: triton_kernels.merge_splits_kernel,
    FLASH_LAUNCH: gather_queries_kernel,  # and FlashAttention, which is no kernel of ours
}


def tuning_of(point: GridPoint, device: torch.device, dtype: torch.dtype) -> Tuning:
    """The launch parameters that the table has for a point."""
    entry = tuning_for(device_architecture(device), point.head_size, dtype)
    return entry.with_room_for(point.heads // point.kv_heads)


def shape_of(point: GridPoint, device: torch.device, dtype: torch.dtype, tuning: Tuning | None = None) -> WorkPlanShape:
    """What plans for a point must look like on a device, with other launch parameters than the table's if given."""
    shape = plan_shape(
        block_size=point.block_size,
        heads=point.heads,
        kv_heads=point.kv_heads,
        head_size=point.head_size,
        dtype=dtype,
        device=device,
    )
    if tuning is None:
        return shape
    programs = tuning.shared.programs_per_multiprocessor * multiprocessors(device)
    return replace(
        shape, shared_tile_rows=tuning.shared.high_tile_rows, target_items=max(1, programs // point.kv_heads)
    )


def plan_of(inputs: LayeredStep, *, share: bool, tuning: Tuning | None = None) -> WorkPlan:
    """The plan of a step."""
    shape = shape_of(inputs.point, inputs.device, inputs.query.dtype, tuning)
    return plan_work(inputs.step.block_table, inputs.step.seq_lens, shape, share=share)


def buffers_for(inputs: LayeredStep, plan: WorkPlan, tuning: Tuning | None = None) -> PlanBuffers:
    """Buffers with a plan, of the capacity that an engine of so many requests gives them; scratch space is poisoned."""
    _, heads, head_size = inputs.query.shape
    shape = shape_of(inputs.point, inputs.device, inputs.query.dtype, tuning)
    capacity = PlanCapacity.of_steps(len(inputs.query), shape)
    buffers = PlanBuffers(capacity, heads, head_size, inputs.device)
    buffers.partials.fill_(torch.nan)
    buffers.lses.fill_(torch.nan)
    buffers.load(plan)
    return buffers


def our_call(inputs: LayeredStep, plan: WorkPlan, *, every_launch: bool = True) -> LayerCall:
    """Attention of one layer. `every_launch`: as a captured step has it, also launches without work."""
    buffers = buffers_for(inputs, plan)

    def call(layer: int) -> torch.Tensor:
        return prefix_shared_attention(
            inputs.query,
            *inputs.caches[layer],
            inputs.block_table,
            scale=inputs.scale,
            plan=buffers,
            impl="triton",
            output=inputs.output,
            every_launch=every_launch,
        )

    return call


def idle_call(inputs: LayeredStep, plan: WorkPlan) -> LayerCall:
    """All launches of a layer, with nothing to do: what launches cost in a captured step. It writes no output."""
    return our_call(inputs, _nothing_of(plan))


def _nothing_of(plan: WorkPlan) -> WorkPlan:
    return replace(
        plan,
        **{name: getattr(plan, name)[:0] for name in ("shared_items", "shared_rows", "own_items", "merges", "nodes")},
        node_row_start=plan.node_row_start[:1],
        partials=0,
        own_partials=0,
    )


def flash_settings(inputs: LayeredStep, attention: VarlenAttention, rows: int) -> FlashSettings:
    """FlashAttention 3 for the shared parts of steps of so many rows."""
    point = inputs.point
    shape = plan_shape(
        block_size=point.block_size,
        heads=point.heads,
        kv_heads=point.kv_heads,
        head_size=point.head_size,
        dtype=inputs.query.dtype,
        device=inputs.device,
        shared_impl="flash_attention_3",
    )
    return FlashSettings(
        attention,
        shape,
        point.kv_heads,
        inputs.query.dtype,
        inputs.block_table.shape[1],
        SequenceBounds.of_steps(rows, shape),
    )


def flash_calls(inputs: LayeredStep, attention: VarlenAttention) -> dict[str, LayerCall]:
    """The same with FlashAttention 3 for the shared parts, of a plan of its own.

    As in a captured step, launched for all plans of so many rows; launched for this plan; its launches alone; and in a
    captured step that has nothing to do.

    Args:
        inputs: the step.
        attention: FlashAttention 3.
    """
    point, rows = inputs.point, len(inputs.query)
    settings = flash_settings(inputs, attention, rows)
    plan = plan_work(inputs.step.block_table, inputs.step.seq_lens, settings.shape)
    if not len(plan.nodes):
        return {}
    capacity = PlanCapacity.of_steps(rows, settings.shape)

    def buffers(of: WorkPlan, launched_for: int | None) -> PlanBuffers:
        made = PlanBuffers(capacity, point.heads, point.head_size, inputs.device, flash=settings)
        made.partials.view(torch.int32).fill_(-1)  # NaN for 32 bits and for 16
        made.lses.fill_(torch.nan)
        made.load(of, inputs.block_table, rows=launched_for)
        return made

    def call(of: WorkPlan, launched_for: int | None) -> LayerCall:
        made = buffers(of, launched_for)

        def attend(layer: int) -> torch.Tensor:
            return prefix_shared_attention(
                inputs.query,
                *inputs.caches[layer],
                inputs.block_table,
                scale=inputs.scale,
                plan=made,
                impl="triton",
                shared_impl="flash_attention_3",
                output=inputs.output,
                every_launch=launched_for is not None,
            )

        return attend

    prepared = launch.PreparedLaunches(
        inputs.query,
        *inputs.caches[0],
        inputs.block_table,
        inputs.output,
        inputs.scale,
        buffers(plan, rows),
        tuning_of(point, inputs.device, inputs.query.dtype),
        _launching_only(FLASH_LAUNCH),
    )

    def shared_parts(layer: int) -> torch.Tensor:
        prepared.run(inputs.query, *inputs.caches[layer], inputs.block_table, inputs.output, every_launch=True)
        return inputs.output

    return {
        FLASH_SHARED: call(plan, rows),
        FLASH_OF_PLAN: call(plan, None),
        FLASH_LAUNCH: shared_parts,
        FLASH_IDLE: call(_nothing_of(plan), rows),
    }


def tuned_call(inputs: LayeredStep, plan: WorkPlan, tuning: Tuning | None = None, only: str | None = None) -> LayerCall:
    """Attention of one layer with launch parameters of its own.

    Args:
        inputs: the step.
        plan: made for these parameters.
        tuning: launch parameters, None for the table's.
        only: the one launch to run, one of `KERNELS`; partial results that it reads are zeros then.
    """
    parameters = tuning or tuning_of(inputs.point, inputs.device, inputs.query.dtype)
    buffers = buffers_for(inputs, plan, tuning)
    if only:
        buffers.partials.zero_()
        buffers.lses.zero_()
    prepared = launch.PreparedLaunches(
        inputs.query,
        *inputs.caches[0],
        inputs.block_table,
        inputs.output,
        inputs.scale,
        buffers,
        parameters,
        _launching_only(only),
    )

    def call(layer: int) -> torch.Tensor:
        caches = inputs.caches[layer]
        prepared.run(inputs.query, *caches, inputs.block_table, inputs.output, every_launch=True)
        return inputs.output

    return call


def launches_alone(inputs: LayeredStep, plan: WorkPlan) -> dict[str, LayerCall]:
    """Each launch for which a plan has work, alone."""
    work = {SHARED_LAUNCH: plan.shared_items, OWN_LAUNCH: plan.own_items, MERGE_LAUNCH: plan.merges}
    return {name: tuned_call(inputs, plan, only=name) for name, items in work.items() if len(items)}


def own_bytes(inputs: LayeredStep, plan: WorkPlan) -> int:
    """What the own launch of a layer reads and writes."""
    _, heads, head_size = inputs.query.shape
    own = plan.own_items
    direct = int((own[:, OwnItem.OUT_SLOT] == DIRECT).sum())
    taken_in = int((own[:, OwnItem.END_SLOT] - own[:, OwnItem.FIRST_SLOT]).sum())
    partials = (taken_in + len(own) - direct) * heads * (head_size + 1) * PARTIAL_BYTES
    queries = (len(own) + direct) * heads * head_size * inputs.query.itemsize
    return int(plan.own_kv_tokens_read * inputs.kv_token_bytes + queries + partials)


def _launching_only(name: str | None) -> Callable[[Any, dict[str, Any]], launch.Launcher] | None:
    if name is None:
        return None
    make = launch.interpreted_launcher if triton_kernels.INTERPRETED else launch.compiled_launcher
    chosen = KERNELS[name]

    def nothing(grid: tuple[int, int, int], arguments: tuple[Any, ...], aligned: bool) -> None:
        """Starts no kernel."""

    def launcher(kernel: Any, options: dict[str, Any]) -> launch.Launcher:
        return make(kernel, options) if kernel is chosen else nothing

    return launcher
