"""Prefix-shared attention: the one function that callers use, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from batchllm_kernels.attention.flash_shared import TILE_ROWS, SharedImplementation
from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.reference import planned_attention
from batchllm_kernels.attention.tuning import Tuning, device_architecture, multiprocessors, tuning_for
from batchllm_kernels.attention.work_plan import OwnItem, WorkPlanShape

if TYPE_CHECKING:
    from batchllm_kernels.attention.launch import PreparedLaunches

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256
BLOCK_MULTIPLE = 16
"""KV tokens of a block are a multiple of it: a matrix unit multiplies so many keys at least."""

Implementation = Literal["triton", "reference"]


def prefix_shared_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    *,
    scale: float,
    plan: PlanBuffers,
    impl: Implementation,
    shared_impl: SharedImplementation = "triton",
    output: torch.Tensor | None = None,
    every_launch: bool = False,
) -> torch.Tensor:
    """Attention of decode rows over a paged KV cache, reading shared leading blocks once for all who share them.

    A row is a request with one query token, the last of its sequence, whose keys are in the cache: query token i
    belongs to row i of the block table. Tensors of a layout that was seen before are not checked again.

    Args:
        query: [tokens, heads, head_size], fp32, fp16 or bf16.
        key_cache: [blocks, block_size, kv_heads, head_size], dtype and device of the query, any strides but 1 along
            head_size. vLLM's cache `[blocks, kv_heads, block_size, 2 * head_size]` gives both caches as views:
            `cache.transpose(1, 2).split(head_size, dim=-1)`.
        value_cache: as key_cache.
        block_table: int32 [tokens, max_blocks].
        scale: factor of the scores before the softmax.
        plan: the step's work plan on the query's device, from `plan_work` on the same block table.
        impl: "triton", or "reference" for plain PyTorch in fp32; never chosen for the caller.
        shared_impl: of "triton", what runs the shared parts: its own kernel, or FlashAttention 3, for which the buffers
            must be made (`PlanBuffers.flash`).
        output: where the result goes, shape, dtype and device of the query; new if None.
        every_launch: run also the launches that the loaded plan has nothing for, and over what any plan may have:
            whoever captures a CUDA graph replays it for the plans that are loaded later.

    Returns:
        `output`; rows that the plan does not have, and padding, are left as they are.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if output is None:
        output = torch.empty_like(query)
    work = plan.plan
    if work is None:
        raise ValueError("plan: expected buffers with a plan loaded, got empty ones")
    buffers_for: SharedImplementation = "triton" if plan.flash is None else "flash_attention_3"
    if buffers_for != shared_impl:
        raise ValueError(f"shared_impl: expected {buffers_for!r}, for which the buffers are made, got {shared_impl!r}")
    if every_launch and plan.flash is not None and not plan.flash.bounds.sequences:
        raise ValueError("every_launch: expected a plan loaded with `rows`, got one without shared parts and bounds")
    if work.query_tokens > query.shape[0]:
        raise ValueError(f"plan: expected at most {len(query)} query tokens, got {work.query_tokens}")
    layout = (
        impl,
        scale,
        query.dtype,
        query.shape,
        query.stride(),
        key_cache.shape,
        key_cache.stride(),
        value_cache.stride(),
        block_table.stride(),
        output.stride(),
    )
    last_layout, launches = plan.last_prepared
    if layout != last_layout:  # other layers of a step have that of the layer before
        launches = plan.prepared.get(layout)
    if launches is None:
        _check_tensors(query, key_cache, value_cache, block_table, output, plan)
        if impl == "reference":
            work = plan.read_back()
            result = planned_attention(query, key_cache, value_cache, block_table, scale, work)
            written = torch.from_numpy(work.own_items[:, OwnItem.TOKEN]).to(output.device).long()
            output[written] = result[written].to(output.dtype)
            return output
        launches = plan.prepared[layout] = _prepared(
            query, key_cache, value_cache, block_table, output, scale, plan, impl
        )
    plan.last_prepared = layout, launches
    launches.run(query, key_cache, value_cache, block_table, output, every_launch=every_launch)
    return output


def _prepared(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    plan: PlanBuffers,
    impl: Implementation,
) -> PreparedLaunches:
    if impl != "triton":
        raise ValueError(f"impl: expected 'triton' or 'reference', got {impl!r}")
    tuning = _tuning(query.shape[1] // key_cache.shape[2], query.shape[2], query.dtype, query.device)
    work = plan.plan
    of_kernel = tuning.shared.high_tile_rows
    if plan.flash is None and work is not None and work.shared_tile_rows != of_kernel:
        raise ValueError(
            f"plan: expected tiles of {of_kernel} rows (plan_shape gives them), got {work.shared_tile_rows}"
        )
    from batchllm_kernels.attention.launch import PreparedLaunches

    return PreparedLaunches(query, key_cache, value_cache, block_table, output, scale, plan, tuning)


def plan_shape(
    *,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    target_items: int | None = None,
    shared_impl: SharedImplementation = "triton",
) -> WorkPlanShape:
    """The shape that plans for these kernels on this device must have.

    Args:
        block_size: tokens of a KV block.
        heads, kv_heads: of this rank.
        head_size: numbers of a head.
        dtype: of query and cache.
        device: that runs the kernels.
        target_items: shared items, and own items, per KV head that fill the device; default as many programs as keep
            it busy, of an H100 where the device has no multiprocessors.
        shared_impl: what runs the shared parts.

    Raises:
        ValueError: when the heads are not supported.
    """
    _check_heads(heads, kv_heads, head_size)
    if block_size % BLOCK_MULTIPLE:
        raise ValueError(f"block_size: expected a multiple of {BLOCK_MULTIPLE} tokens, got {block_size}")
    tuning = _tuning(heads // kv_heads, head_size, dtype, device)
    tile_rows, programs = tuning.shared.high_tile_rows, tuning.shared.programs_per_multiprocessor
    if shared_impl == "flash_attention_3":
        tile_rows, programs = max(TILE_ROWS, heads // kv_heads), 1
    processors = multiprocessors(device)
    own_programs = tuning.own.programs_per_multiprocessor
    return WorkPlanShape(
        block_size=block_size,
        queries_per_kv_head=heads // kv_heads,
        element_bytes=dtype.itemsize,
        shared_tile_rows=tile_rows,
        target_items=target_items or max(1, programs * processors // kv_heads),
        own_target_items=target_items or max(1, own_programs * processors // kv_heads),
    )


def _tuning(queries_per_kv_head: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    return tuning_for(device_architecture(device), head_size, dtype).with_room_for(queries_per_kv_head)


def _check_tensors(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    output: torch.Tensor,
    plan: PlanBuffers,
) -> None:
    if query.ndim != 3:
        raise ValueError(f"query: expected [tokens, heads, head_size], got {list(query.shape)}")
    if query.dtype not in DTYPES:
        raise ValueError(f"query: expected one of {', '.join(map(str, DTYPES))}, got {query.dtype}")
    if key_cache.ndim != 4 or key_cache.shape[3] != query.shape[2]:
        raise ValueError(
            f"key_cache: expected [blocks, block_size, kv_heads, {query.shape[2]}], got {list(key_cache.shape)}"
        )
    if block_table.ndim != 2:
        raise ValueError(f"block_table: expected [tokens, max_blocks], got {list(block_table.shape)}")
    _check_heads(query.shape[1], key_cache.shape[2], query.shape[2])
    for name, tensor, shape, dtype in (
        ("query", query, query.shape, query.dtype),
        ("key_cache", key_cache, key_cache.shape, query.dtype),
        ("value_cache", value_cache, key_cache.shape, query.dtype),
        ("block_table", block_table, (len(query), block_table.shape[1]), torch.int32),
        ("output", output, query.shape, query.dtype),
    ):
        _check_tensor(name, tensor, tuple(shape), dtype, query.device)
    work = plan.plan
    if work is not None and work.block_size != key_cache.shape[1]:
        raise ValueError(f"plan: expected one for blocks of {key_cache.shape[1]} tokens, got {work.block_size}")
    if plan.partials.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"plan: expected buffers for heads and head size {list(query.shape[1:])}, "
            f"got {list(plan.partials.shape[1:])}"
        )


def _check_heads(heads: int, kv_heads: int, head_size: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads: expected a multiple of {kv_heads} KV heads, got {heads}")
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"head_size: expected 1 to {MAX_HEAD_SIZE}, got {head_size}")


def _check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    for expected, got in ((shape, tuple(tensor.shape)), (dtype, tensor.dtype), (device, tensor.device)):
        if expected != got:
            raise ValueError(f"{name}: expected {expected}, got {got}")
    if tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected stride 1 along its last dimension, got {tensor.stride(-1)}")
