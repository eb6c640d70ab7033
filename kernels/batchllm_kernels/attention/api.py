"""Prefix-shared attention: the one function that callers use, and what it refuses."""

from __future__ import annotations

from typing import Literal

import torch

from batchllm_kernels.attention.plan_buffers import PlanBuffers
from batchllm_kernels.attention.reference import planned_attention
from batchllm_kernels.attention.tuning import Tuning, device_architecture, tuning_for
from batchllm_kernels.attention.work_plan import PlanShape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_SIZE = 256
MULTIPROCESSORS_OF_H100 = 132
PROGRAMS_PER_MULTIPROCESSOR = 4

Implementation = Literal["triton", "reference"]


def prefix_shared_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    scale: float,
    plan: PlanBuffers,
    impl: Implementation,
    output: torch.Tensor | None = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of a batch over a paged KV cache, reading shared leading blocks once for all who share them.

    Args:
        query: [tokens, heads, head_size], fp32, fp16 or bf16; tokens of one request stand together.
        key_cache: [blocks, block_size, kv_heads, head_size], dtype and device of the query, any strides but 1 along
            head_size. vLLM's cache `[blocks, kv_heads, block_size, 2 * head_size]` gives both caches as views:
            `cache.transpose(1, 2).split(head_size, dim=-1)`.
        value_cache: as key_cache.
        block_table: int32 [requests, max_blocks].
        seq_lens: int32 [requests], tokens of each request with those of this step, whose keys are in the cache.
        query_start_loc: int32 [requests + 1], first query token of each request.
        scale: factor of the scores before the softmax.
        plan: the step's work plan on the query's device, from `plan_work` on the same three arrays.
        impl: "triton", or "reference" for plain PyTorch in fp32; never chosen for the caller.
        output: where the result goes, shape, dtype and device of the query; new if None.
        sliding_window, logits_soft_cap, alibi_slopes: must be None; not supported.

    Returns:
        `output`; rows of query tokens that no request has are left as they are.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    for name, value in (
        ("sliding_window", sliding_window),
        ("logits_soft_cap", logits_soft_cap),
        ("alibi_slopes", alibi_slopes),
    ):
        if value is not None:
            raise ValueError(f"{name}: expected None, prefix-shared attention does not support it; got {value}")
    _check_tensors(query, key_cache, value_cache, block_table, seq_lens, query_start_loc)
    if output is None:
        output = torch.empty_like(query)
    _check_tensor("output", output, tuple(query.shape), query.dtype, query.device)
    work = plan.plan
    if work is None:
        raise ValueError("plan: expected buffers with a plan loaded, got empty ones")
    if work.block_size != key_cache.shape[1]:
        raise ValueError(f"plan: expected one for blocks of {key_cache.shape[1]} tokens, got {work.block_size}")
    if work.query_tokens > len(query):
        raise ValueError(f"plan: expected at most {len(query)} query tokens, got {work.query_tokens}")
    if plan.partials.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"plan: expected buffers for heads and head size {list(query.shape[1:])}, "
            f"got {list(plan.partials.shape[1:])}"
        )
    arguments = (query, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale)
    if impl == "reference":
        result = planned_attention(*arguments, work)
        output[: work.query_tokens] = result[: work.query_tokens].to(output.dtype)
        return output
    if impl != "triton":
        raise ValueError(f"impl: expected 'triton' or 'reference', got {impl!r}")
    tuning = _tuning(query.shape[1] // key_cache.shape[2], query.shape[2], query.dtype, query.device)
    if (tuning.narrow_tile_rows, tuning.wide_tile_rows) != work.tile_rows:
        raise ValueError(
            f"plan: expected tiles of {tuning.narrow_tile_rows} and {tuning.wide_tile_rows} rows "
            f"(plan_shape gives them), got {work.tile_rows[0]} and {work.tile_rows[1]}"
        )
    from batchllm_kernels.attention.launch import launch_planned_attention

    launch_planned_attention(*arguments, plan, tuning, output)
    return output


def plan_shape(
    *,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    target_items: int | None = None,
) -> PlanShape:
    """The shape that plans for these kernels on this device must have.

    Args:
        block_size: tokens of a KV block.
        heads, kv_heads: of this rank.
        head_size: numbers of a head.
        dtype: of query and cache.
        device: that runs the kernels.
        target_items: items per KV head that fill the device; default four programs for each multiprocessor, of an
            H100 where the device has none.

    Raises:
        ValueError: when the heads are not supported.
    """
    _check_heads(heads, kv_heads, head_size)
    tuning = _tuning(heads // kv_heads, head_size, dtype, device)
    if target_items is None:
        processors = MULTIPROCESSORS_OF_H100
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        target_items = max(1, PROGRAMS_PER_MULTIPROCESSOR * processors // kv_heads)
    return PlanShape(
        block_size=block_size,
        queries_per_kv_head=heads // kv_heads,
        element_bytes=dtype.itemsize,
        narrow_tile_rows=tuning.narrow_tile_rows,
        wide_tile_rows=tuning.wide_tile_rows,
        target_items=target_items,
    )


def _tuning(queries_per_kv_head: int, head_size: int, dtype: torch.dtype, device: torch.device) -> Tuning:
    return tuning_for(device_architecture(device), head_size, dtype).with_room_for(queries_per_kv_head)


def _check_tensors(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
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
        raise ValueError(f"block_table: expected [requests, max_blocks], got {list(block_table.shape)}")
    _check_heads(query.shape[1], key_cache.shape[2], query.shape[2])
    requests = len(seq_lens)
    for name, tensor, shape, dtype in (
        ("query", query, query.shape, query.dtype),
        ("key_cache", key_cache, key_cache.shape, query.dtype),
        ("value_cache", value_cache, key_cache.shape, query.dtype),
        ("block_table", block_table, (requests, block_table.shape[1]), torch.int32),
        ("seq_lens", seq_lens, (requests,), torch.int32),
        ("query_start_loc", query_start_loc, (requests + 1,), torch.int32),
    ):
        _check_tensor(name, tensor, tuple(shape), dtype, query.device)


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
